"""What does a run say of itself before its first step?"""

import json
from pathlib import Path

from torch import nn

from component.adapter import trainable_counts
from component.train.argument import LongQLoRAArguments


def summary(rows: dict[str, str]) -> str:
    """The lines shown before the first step, aligned."""
    width = max(len(name) for name in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())


def describe_trainable(model: nn.Module) -> str:
    counts = trainable_counts(model)
    parts = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    return f"{sum(counts.values()):,} parameters ({parts})"


def zero_settings(deepspeed: str | dict | None) -> tuple[int | None, bool]:
    """ZeRO's stage, None without DeepSpeed, and whether the optimizer's states are in host memory."""
    if not deepspeed:
        return None, False
    zero = _read_deepspeed(deepspeed).get("zero_optimization", {})
    return zero.get("stage", 0), zero.get("offload_optimizer", {}).get("device", "none") != "none"


def _read_deepspeed(deepspeed: str | dict) -> dict:
    return deepspeed if isinstance(deepspeed, dict) else json.loads(Path(deepspeed).read_text(encoding="utf-8"))


def describe_attention(args: LongQLoRAArguments) -> str:
    if not args.use_shift_short_attention:
        return "full" + (", in every step: full_attention_ratio changes nothing" if args.full_attention_ratio else "")
    last = f"in the last {100 * args.full_attention_ratio:g} % of the steps and " if args.full_attention_ratio else ""
    return f"S2-Attn in groups of {args.group_tokens} tokens, full attention {last}when evaluating"


def describe_optimizer(optim: str, deepspeed: str | dict | None, max_grad_norm: float) -> str:
    """The optimizer that will really run: DeepSpeed's configuration changes it behind the YAML's back."""
    if not deepspeed:
        return optim
    stage, is_offloaded = zero_settings(deepspeed)
    notes = [f"ZeRO-{stage}"]
    if is_offloaded:
        notes.append(f"DeepSpeed's CPU Adam in place of {optim}, because the optimizer is offloaded")
    if "gradient_clipping" not in _read_deepspeed(deepspeed) and max_grad_norm:
        notes.append(f"max_grad_norm {max_grad_norm} is ignored: the DeepSpeed file lacks gradient_clipping")
    return f"{optim} ({'; '.join(notes)})"
