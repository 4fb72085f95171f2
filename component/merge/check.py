"""Does a merged model equal the adapter on its base? Compares each tensor, the hidden states and the logits.

They differ only by rounding: the merge rounds the sum of weight and adapter once to the dtype of the result (relative
error of at most 2^-11 in fp16, 2^-8 in bf16), while the unmerged model keeps the two apart.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from component.error import UserError
from component.loading import default_device, free_memory, inference_dtype, load_model
from component.merge.pair import Difference
from component.merge.plan import MergePlan
from component.merge.stream import BOUNDS, HIDDEN, can_stream, run_both
from component.rope import context_length
from component.storage.tensor_reader import model_tensors

TOKENS = 64  # at the start of the context, and at its end
TEXT = (
    "A model that was trained on short texts has never seen the positions of a long one. When all positions are "
    "pressed together until they fit, it has to learn to tell neighbours apart that stand closer than before. 1, 2, "
    "3, and so on: every number comes after the one that it comes after. "
)
CURE = (
    "compare it with the adapter and --base that it was merged from, or merge again; if they still differ, merge with "
    "PEFT and report the problem"
)


@dataclass
class Agreement:
    """Difference between the logits of two models at some positions."""

    first: int  # position
    last: int
    largest: float
    mean: float
    spread: float  # standard deviation of the first model's logits
    same_argmax: float  # share of positions

    def __str__(self) -> str:
        return (
            f"positions {self.first} to {self.last}: logits differ by {self.largest:.2g} at most and {self.mean:.2g} "
            f"on average ({self.mean / self.spread:.2%} of their standard deviation); same top-1 token at "
            f"{self.same_argmax:.2%}"
        )


def agreement(ours: torch.Tensor, theirs: torch.Tensor, positions: torch.Tensor) -> Agreement:
    """Compare the logits (T, V) of two models at `positions` (T,)."""
    gap = (theirs - ours).float().abs()
    first, last = int(positions[0]), int(positions[-1])
    if not gap.isfinite().all():
        return Agreement(first, last, math.inf, math.inf, 1.0, 0.0)
    spread = max(float(ours.float().std(correction=0)), 1e-15)
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    return Agreement(first, last, float(gap.max()), float(gap.mean()), spread, same)


def fixed_input(tokenizer: PreTrainedTokenizerBase, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and positions (places, T) of a fixed text at the start and at the end of a context of `context` tokens."""
    tokens = min(TOKENS, context)
    starts = sorted({0, context - tokens})
    ids: list[int] = tokenizer(TEXT).input_ids
    size = tokens * len(starts)
    text = torch.tensor((ids * math.ceil(size / len(ids)))[:size]).reshape(len(starts), tokens)
    return text, torch.tensor(starts)[:, None] + torch.arange(tokens)


def check_merged(
    folder: Path,
    plan: MergePlan,
    adapter: str,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    load_adapted: Callable[..., PreTrainedModel],
    *,
    hint_if_skipped: str | None = None,
) -> list[Agreement]:
    """Compare the merged model in `folder` with the adapter on its base, and print the differences.

    Args:
        config: the base's, extended.
        load_adapted: loads the whole adapter on its base, for models that cannot be run a tensor at a time.
        hint_if_skipped: such a model is not compared if memory is short; what is printed then.

    Raises:
        UserError: they differ by more than rounding.
    """
    ids, positions = fixed_input(tokenizer, context_length(config))
    bound = max(BOUNDS.get(stored.dtype, 0.0) for stored in model_tensors(str(folder), "save_path").values())
    found: dict[str, Difference] = {}
    if can_stream(config):
        device = _device(plan, ids.numel())
        found, ours, theirs = run_both(folder, plan, adapter, config, ids.to(device), positions.to(device), bound)
        print(
            f"merged model and adapter on its base compared in float32 on {device.type}; largest relative difference:"
        )
        print(_by_kind(found))
    else:
        device = default_device()
        print(f"model type {config.model_type!r} cannot be compared a tensor at a time; whole models are loaded")
        if hint_if_skipped and (problem := _short_memory(plan, device)):
            print(f"not compared with the adapter: {problem}; {hint_if_skipped}", file=sys.stderr)
            return []
        dtype = inference_dtype(device, plan.config.dtype)
        bound = max(bound, BOUNDS[dtype])
        ours, theirs = (
            _logits(load, dtype, ids.to(device), positions.to(device))
            for load in (load_adapted, partial(load_model, str(folder)))
        )
    results = [agreement(*place) for place in zip(ours, theirs, positions, strict=True)]
    for result in results:
        print(result, flush=True)
    _refuse(found, results, bound)
    return results


def _device(plan: MergePlan, tokens: int) -> torch.device:
    """The GPU if what is in memory at a time fits, else the CPU."""
    device = default_device()
    if device.type == "cuda":
        widest = max(math.prod(stored.shape) for stored in plan.tensors.values())
        if 4 * (4 * widest + 8 * tokens * plan.config.vocab_size) > torch.cuda.mem_get_info()[0]:
            return torch.device("cpu")
    return device


def _short_memory(plan: MergePlan, device: torch.device) -> str:
    """How much memory is missing for one whole model; empty if it fits."""
    needed = 1.2 * inference_dtype(device).itemsize * plan.parameters
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    return f"it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free" if needed > free else ""


@torch.no_grad()
def _logits(
    load: Callable[..., PreTrainedModel], dtype: torch.dtype, ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Logits (places, T, V) of a whole model, which is loaded and released."""
    model = load(dtype=dtype, device=ids.device)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    del model
    free_memory()
    return logits


def _by_kind(found: dict[str, Difference]) -> str:
    """The largest difference of each kind of tensor."""
    largest: dict[str, float] = {}
    for difference in found.values():
        largest[difference.kind] = max(largest.get(difference.kind, 0.0), difference.relative)
    return "  " + ", ".join(f"{kind} {share:.1e}" for kind, share in largest.items())


def _refuse(found: dict[str, Difference], results: list[Agreement], bound: float) -> None:
    """Raise a `UserError` if tensors, or else hidden states, or else logits, differ by more than rounding."""
    wrong = {name: difference for name, difference in found.items() if not difference.is_rounding}
    wrong = {name: difference for name, difference in wrong.items() if difference.kind != HIDDEN} or wrong
    if wrong:
        first, *others = wrong
        named = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        more = f" ({len(others)} more differ: {named})" if others else ""
        raise UserError(
            f"--check: {first} of the merged model differs from the adapter on its base by "
            f"{wrong[first].relative:.2%}, and rounding explains {wrong[first].bound:.2%}{more}; {CURE}"
        )
    for result in results:
        if not result.mean <= bound * result.spread:
            raise UserError(
                f"--check: at positions {result.first} to {result.last} the merged model's logits differ from the "
                f"adapter's by {result.mean / result.spread:.2%} of their standard deviation, and rounding explains "
                f"{bound:.1%}; {CURE}"
            )
