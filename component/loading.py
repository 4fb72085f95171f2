"""How is a model loaded for inference? A plain or merged model, or a base with an adapter, at its extended context."""

import functools
import gc
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from component.adapter import ADAPTER_CONFIG, adapter_hash, check_adapter, load_adapter, named_base
from component.checkpoint import RECORD_FILE, read_json, read_record
from component.error import UserError, naming
from component.model import load_base, load_config
from component.rope import (
    THETA,
    context_length,
    extend_context,
    is_trained_scaling,
    original_context,
    own_rope_type,
    rope_factor,
)
from component.storage.fingerprint import fingerprint
from component.storage.hub import check_source
from component.storage.tensor_reader import MODEL_FILES
from component.tokenizer import load_tokenizer


def free_memory() -> None:
    """Release the memory of deleted models; modules and their hooks form reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def recorded_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of the training run, from the record beside the tokenizer.

    Models of others, and those trained on texts, have none there: their own if they have one, else `vicuna`.
    """
    own = "tokenizer" if tokenizer.chat_template else "vicuna"
    record = read_record(tokenizer.name_or_path)
    if record is None:
        return own
    return record.get("template", "vicuna") or own  # early records lack it: then there was no other


def end_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that end a text, of the model's generation config and config: chat models have several."""
    found: set[int] = set()
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return sorted(found)


def default_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def inference_dtype(device: torch.device, stored: torch.dtype | None = None) -> torch.dtype:
    """fp32 on a CPU, where half precision is slow; on a GPU bf16 for models stored in it, fp16 for all others.

    fp16 is more exact, but activations of models trained in bf16 may exceed its range. GPUs without bf16 (V100,
    Turing) compute in fp16 all the same.

    Args:
        stored: the config's dtype.
    """
    if device.type != "cuda":
        return torch.float32
    is_wide = stored == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if is_wide else torch.float16


class ModelSource(NamedTuple):
    """Where a model comes from."""

    base: str
    source: str  # of config and tokenizer
    is_ours: bool  # the source is a LongQLoRA adapter folder
    adapter: str | None


def resolve_model(
    model_name_or_path: str | None,
    adapter_name_or_path: str | None,
    field: str = "model_name_or_path",
    adapter_field: str = "adapter_name_or_path",
) -> ModelSource:
    """Which base and adapter two flags mean; an adapter alone, by either flag, names its base.

    Raises:
        UserError: no such adapter or base, a base that is neither given nor recorded, or one that already contains the
            adapter.
    """
    model, adapter = model_name_or_path, adapter_name_or_path
    if model and not adapter and _is_adapter(model, field, adapter_field):
        _say(f"{field}: {model} is an adapter; it is used with the base that it names")
        model, adapter, adapter_field = None, model, field
    if not adapter:
        if not model:
            raise UserError(f"{field}: missing; name a model, or an adapter with {adapter_field}")
        check_source(model, field)
        return ModelSource(model, model, False, None)
    check_adapter(adapter, adapter_field)
    record = read_record(adapter)
    with naming(adapter_field):
        named = record["base_model"] if record else named_base(adapter)
    base = model or named
    if not base:
        raise UserError(f"{field}: missing, and {adapter} does not say which base model it was trained on; name it")
    if model:
        _check_pair(model, adapter, named, field)
        check_source(model, field)
    else:
        check_source(base, field, f"base model of {adapter}")
        if not record:
            _say(f"{field}: {base}, as {adapter}'s adapter_config.json says")
    then = (record or {}).get("base_weights")  # older records lack it
    if then and _is_same_place(base, str(named)) and fingerprint(base, weights_alone=True) not in (then, None):
        _say(f"warning: {base} has other weights than when {adapter} was trained on it; its output may be useless")
    return ModelSource(base, adapter if record else base, record is not None, adapter)


def _is_adapter(source: str, field: str, adapter_field: str) -> bool:
    """Whether a folder holds an adapter and no model."""
    folder = Path(source)
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if any((folder / name).is_file() for name in MODEL_FILES):
        raise UserError(
            f"{field}: {source} holds both a model and an adapter; to use both, name it as {adapter_field} "
            f"too, else move {ADAPTER_CONFIG} out of it"
        )
    return True


def _check_pair(model: str, adapter: str, named: str | None, field: str) -> None:
    """Refuse a model that was merged from this adapter, which would be added twice; warn of another base.

    Args:
        named: the base that the adapter names.

    Raises:
        UserError: the model's record says that it was merged from the adapter.
    """
    record = read_json(Path(model) / RECORD_FILE)
    origin, recorded = record.get("merged_from"), record.get("merged_sha256")
    if isinstance(origin, str):
        is_same = recorded == adapter_hash(adapter) if recorded else _is_same_place(origin, adapter)
        if is_same:
            raise UserError(
                f"{field}: {model} was merged from {adapter}, so the adapter would be added twice; leave the adapter "
                f"out, or name its base, {record.get('base_model')}"
            )
    if named and not _is_same_place(named, model) and Path(named).name != Path(model).name:
        _say(f"warning: {adapter} was trained on {named}, not on {model}; on another base its output may be useless")


def _is_same_place(one: str, other: str) -> bool:
    return one == other or Path(one).resolve() == Path(other).resolve()


@functools.cache
def _say(text: str) -> None:
    """Print a line on stderr, once, and by one process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)


def trained_hash(model: str | None, adapter: str | None) -> str | None:
    """sha256 of the adapter, or of the one that was merged into the model: after more training, names are the same."""
    origin = resolve_model(model, adapter)
    if origin.adapter:
        return adapter_hash(origin.adapter)
    merged = read_json(Path(origin.base) / RECORD_FILE).get("merged_sha256")
    return merged if isinstance(merged, str) else None


def load_for_inference(
    model_name_or_path: str | None, adapter_name_or_path: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `load_model` loads, and its tokenizer."""
    model = load_model(model_name_or_path, adapter_name_or_path, **options)
    return model, load_tokenizer(resolve_model(model_name_or_path, adapter_name_or_path).source)


def inference_config(
    model_name_or_path: str | None,
    adapter_name_or_path: str | None = None,
    *,
    context_size: int | None = None,
    field: str = "model_name_or_path",
    adapter_field: str = "adapter_name_or_path",
) -> PretrainedConfig:
    """The config that `load_model` loads the same model with."""
    origin = resolve_model(model_name_or_path, adapter_name_or_path, field, adapter_field)
    return extended_config_of(origin.source, context_size, is_fixed=origin.is_ours, field=field)


def load_model(
    model_name_or_path: str | None,
    adapter_name_or_path: str | None = None,
    *,
    context_size: int | None = None,
    load_in_4bit: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    attention: str | None = None,
    field: str = "model_name_or_path",
    adapter_field: str = "adapter_name_or_path",
) -> PreTrainedModel:
    """A plain or merged model, or a base with an adapter, in eval mode with full attention.

    Args:
        model_name_or_path: None for the base that the adapter's record names.
        context_size: tokens to which a plain base is scaled, as in training. LongQLoRA's adapters and extended models
            record their own; a contradiction is an error.
        attention: implementation in transformers; None for its default.
        field, adapter_field: flags to name in error messages.

    Raises:
        UserError: a model that cannot be loaded, an adapter that does not fit, or contradictory context sizes.
    """
    names = {"field": field, "adapter_field": adapter_field}
    base, _, _, adapter = resolve_model(model_name_or_path, adapter_name_or_path, **names)
    config = inference_config(model_name_or_path, adapter_name_or_path, context_size=context_size, **names)
    config._attn_implementation = attention
    device = device or default_device()
    dtype = dtype or inference_dtype(device, load_config(base, field).dtype)
    model = load_base(base, config, dtype=dtype, load_in_4bit=load_in_4bit, device=device).eval()
    # of the model's own settings only the tokens that end a text count; transformers would use the others as defaults
    model.generation_config = GenerationConfig(eos_token_id=end_ids(model))
    return load_adapter(model, adapter) if adapter else model


def extended_config_of(
    source: str, context_size: int | None, *, is_fixed: bool = False, field: str = "model_name_or_path"
) -> PretrainedConfig:
    """The config in `source`, scaled to `context_size` tokens unless it is already extended.

    Args:
        is_fixed: the config belongs to a LongQLoRA adapter and must not be changed. If only its base frequency was
            raised, it is returned as that of a base of the recorded length.

    Raises:
        UserError: `context_size` needs another factor than the config's own, or the adapter's record contradicts it.
    """
    config = load_config(source, field)
    if is_fixed:
        _note_raised_theta(config, source)
    if not context_size or context_size < 0:
        return config
    own_factor = rope_factor(config)
    if not is_fixed and (own_factor == 1.0 or is_trained_scaling(config)):
        extend_context(config, context_size, own_rope_type(config), field="context_size")
        return config
    covered, needed = context_length(config), math.ceil(context_size / original_context(config))
    if context_size > covered if is_trained_scaling(config) else needed != own_factor:
        needs = "" if is_trained_scaling(config) else f" need factor {needed}"
        raise UserError(
            f"context_size: {context_size} tokens{needs}, but the context of {source} is {covered} tokens "
            f"(factor {own_factor:g}); leave context_size out"
        )
    return config


def _note_raised_theta(config: PretrainedConfig, source: str) -> None:
    """Give the config of an adapter whose base frequency was raised the context that its record says.

    Raises:
        UserError: the record says another frequency than the config, or no context.
    """
    record = read_record(source) or {}
    theta, recorded = config.rope_parameters["rope_theta"], record.get("rope_theta")
    if recorded not in (None, theta):
        raise UserError(
            f"{source}: {RECORD_FILE} says rope_theta {str(recorded)[:100]}, but config.json {theta:g}; copy the "
            "adapter's own config.json there again"
        )
    if record.get("rope_type") != THETA:
        return
    tokens = record.get("context_tokens")
    if type(tokens) is not int or not original_context(config) <= tokens < 2**31:
        raise UserError(
            f"{source}: {RECORD_FILE} is damaged (context_tokens: {str(tokens)[:100]}); use another checkpoint"
        )
    config.max_position_embeddings = tokens
