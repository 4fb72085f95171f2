"""What does a model card say? Front matter for the Hugging Face hub, and what longqlora.json and other files know.

No path of this machine, and no claim that no file supports. Names that others chose are quoted.
"""

import itertools
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from component.card.base import License, bases_of, display_name, hub_id, license_of
from component.card.markdown import file_name, quoted, table
from component.card.result import Results
from component.card.usage import Loaded, adapter_usage, merged_usage
from component.checkpoint import RECORD_FILE, read_json
from component.model import load_config
from component.rope import THETA, context_length, original_context

PAPER = "[LongQLoRA](https://arxiv.org/abs/2311.04879)"
FROZEN = (
    "Its `dynamic` positions are frozen as they are for texts of {} tokens, which all engines compute alike; texts "
    "much shorter than that are predicted slightly worse than with positions that depend on the length."
)


def card_text(folder: Path, name: str, results: Results) -> str:
    """The model card of an adapter folder or merged folder, as Markdown with front matter.

    Args:
        name: for the title.

    Raises:
        UserError: the folder's config.json can't be read.
    """
    record = read_json(folder / RECORD_FILE)
    is_merged, bases, model = "merged_from" in record, bases_of(record), _loaded(folder, record)
    known = license_of(bases)
    parts = [
        f"# {quoted(name)}",
        _description(record, bases, model, is_merged),
        f"## Recipe\n\n{table(['setting', 'value'], recipe(record, model))}",
        "## Evaluation",
        *(results.sections or ["No evaluation results were found beside the model when this card was written."]),
        "## Use",
        merged_usage(model) if is_merged else adapter_usage(model),
        f"## Limits\n\n{_limits(record, model, is_merged)}",
        f"## License\n\n{_license(known)}",
    ]
    return f"---\n{_metadata(bases, is_merged, known).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _loaded(folder: Path, record: dict[str, Any]) -> Loaded:
    config = load_config(str(folder), "folder")
    kind, tokens = str(record.get("rope_type")), context_length(config)
    if kind == THETA:  # an adapter's config does not tell what its raised base frequency is good for
        tokens = _whole(record.get("context_tokens")) or tokens
    return Loaded(
        rope_type=kind,
        tokens=tokens,
        original=_whole(record.get("original_tokens")) or original_context(config),
        dtype=_one_of(record.get("dtype"), ("float16", "bfloat16", "float32")) or "auto",
        model_type=config.model_type,
        base=hub_id(record.get("base_model")),
        template=_one_of(record.get("template"), ("vicuna", "tokenizer")),
    )


def _metadata(bases: list[str], is_merged: bool, known: License | None) -> ModelCardData:
    """Front matter. An adapter fits its own base alone; a merged model derives from the nearest one on the hub."""
    on_hub = [found for base in (bases if is_merged else bases[:1]) if (found := hub_id(base))]
    return ModelCardData(
        base_model=on_hub[0] if on_hub else None,
        library_name="transformers" if is_merged else "peft",
        pipeline_tag="text-generation",
        tags=["longqlora", "long-context", *([] if is_merged else ["lora"])],
        **(known.fields if known else {}),
    )


def _named(base: str) -> str:
    """A link to a model on the hub, or the name of a folder."""
    return f"[{base}](https://huggingface.co/{base})" if hub_id(base) else quoted(display_name(base))


def _description(record: dict[str, Any], bases: list[str], model: Loaded, is_merged: bool) -> str:
    base = _named(bases[0]) if bases else "an unnamed base"
    if is_merged:
        said = [f"A language model with a context of {model.tokens} tokens: {base} with a {PAPER} adapter, merged."]
    else:
        said = [f"A LoRA adapter for {base}, trained with {PAPER} for a context of {model.tokens} tokens."]
    for one, before in itertools.pairwise(bases):
        said.append(f"{_named(one)} was made by the same method from {_named(before)}.")
    if model.original < model.tokens:
        said.append(f"The original context is {model.original} tokens.")
    return " ".join(said)


def recipe(record: dict[str, Any], model: Loaded) -> list[tuple[str, str]]:
    """How a model was trained: what the record knows, as rows of a table."""
    arguments, rows = _object(record.get("arguments")), []
    rows.append(("context", f"{model.tokens} tokens, originally {model.original}"))
    rows.append(("positions", _positions(record)))
    if arguments:
        kind = f"chats, template {quoted(record.get('template'))}" if arguments.get("sft") is True else "texts"
        rows.append(("training data", f"{kind}: {file_name(arguments.get('train_file'))}"))
    if longest := _whole(record.get("max_seq_length")):
        skipped = ", with skipped positions (PoSE)" if arguments.get("position_skipping") is True else ""
        rows.append(("training samples", f"up to {longest} tokens{skipped}"))
    if "group_size" in record:
        rows.append(("attention in training", _attention(_whole(record["group_size"]), arguments)))
    if arguments:
        rows.append(("LoRA", _lora(arguments)))
        stored = "NF4" if arguments.get("load_in_4bit") is True else "not quantized"
        kinds = {"fp8": ", multiplied in FP8 (e4m3)", "fp8_backward": ", gradients of activations in FP8 (e4m3)"}
        multiplied = kinds.get(str(arguments.get("frozen_matmul")), "")
        rows.append(("base weights in training", stored + multiplied))
    if steps := _whole(record.get("steps")):
        batch = _whole(_object(record.get("distribution")).get("samples_per_step"))
        rows.append(("steps", f"{steps}, each of {batch} samples" if batch else f"{steps}"))
    if trained := _whole(record.get("trained_tokens")):
        rows.append(("tokens trained", f"{trained:,}"))
    if "merged_from" in record:
        rows.append(("merge", f"into {quoted(record.get('base_weights'))} base weights, stored in {model.dtype}"))
    if versions := _object(record.get("versions")):
        rows.append(("versions", quoted(", ".join(f"{name} {version}" for name, version in versions.items()))))
    return rows


def _positions(record: dict[str, Any]) -> str:
    factor, theta = _number(record.get("rope_factor")), _number(record.get("rope_theta"))
    if record.get("rope_type") == THETA:
        return "unscaled, with a raised base frequency" + (f", rope_theta {theta:g}" if theta else "")
    if not factor or record.get("rope_type") == "default":
        return "unscaled"
    return f"{quoted(record.get('rope_type'))}, factor {factor:g}" + (f", rope_theta {theta:g}" if theta else "")


def _attention(group: int | None, arguments: dict[str, Any]) -> str:
    if not group:
        return "full"
    share = _number(arguments.get("full_attention_ratio"))
    later = f"; full attention in the last {100 * share:g} % of the steps" if share else ""
    return f"shift short attention (S2-Attn), groups of {group} tokens{later}"


def _lora(arguments: dict[str, Any]) -> str:
    rank, alpha = _whole(arguments.get("lora_rank")), _number(arguments.get("lora_alpha"))
    targets = arguments.get("target_modules")
    names = ", ".join(map(str, targets)) if isinstance(targets, list) else targets
    on = quoted(names) if names else "all linear layers but lm_head"
    also = [what for what in ("embedding", "norm") if arguments.get(f"train_{what}") is True]
    rest = f"; {' and '.join(f'{what}s' for what in also)} trained in full" if also else ""
    return f"rank {rank}, alpha {alpha:g}, on {on}{rest}" if rank and alpha is not None else f"on {on}{rest}"


def _limits(record: dict[str, Any], model: Loaded, is_merged: bool) -> str:
    said = [f"- Texts of more than {model.tokens} tokens are outside of the positions that it was made for."]
    longest = _whole(record.get("max_seq_length"))
    if longest and longest < model.tokens:
        said.append(f"- Trained on samples of up to {longest} tokens: longer texts were not seen in training.")
    if is_merged and model.rope_type == "dynamic":
        said.append(f"- {FROZEN.format(model.tokens)}")
    if model.original < model.tokens:
        said.append(
            f"- Texts of up to {model.original} tokens may be predicted worse than by the model before extension."
        )
    if _whole(record.get("group_size")):
        said.append("- Shift short attention belongs to training alone: use ordinary full attention.")
    said.append("- What the base model gets wrong, or must not be used for, holds here too.")
    return "\n".join(said)


def _license(known: License | None) -> str:
    if known is None:
        return (
            "That of the base model applies; it is not known here. Before you publish this folder, look it up and add "
            "`license` to the front matter of this card."
        )
    link = known.fields.get("license_link")
    name = quoted(known.fields.get("license_name") or known.fields["license"])
    return f"That of the base model: the card of {_named(known.base)} states {f'[{name}]({link})' if link else name}."


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < 2**63 else None


def _one_of(value: Any, known: tuple[str, ...]) -> str | None:
    return value if isinstance(value, str) and value in known else None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
