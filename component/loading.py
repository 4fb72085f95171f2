"""How is a model loaded for inference? A plain or merged model, or a base with an adapter, at its extended context."""

import gc
import math
import os
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from component.adapter import check_adapter, load_adapter
from component.checkpoint import read_record
from component.error import UserError
from component.model import load_base, load_config
from component.rope import (
    context_length,
    extend_context,
    is_trained_scaling,
    original_context,
    own_rope_type,
    rope_factor,
)
from component.storage.hub import check_source
from component.tokenizer import load_tokenizer


def free_memory() -> None:
    """Release the memory of deleted models; modules and their hooks form reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def recorded_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of the training run, from the record beside the tokenizer.

    Models of others have no record: their own chat template if they have one, else `vicuna`.
    """
    record = read_record(tokenizer.name_or_path)
    if record is None:
        return "tokenizer" if tokenizer.chat_template else "vicuna"
    return record.get("template") or "vicuna"


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


def inference_dtype(device: torch.device) -> torch.dtype:
    """fp16 on a GPU, as in the published models; fp32 on a CPU, where half precision is slow."""
    return torch.float16 if device.type == "cuda" else torch.float32


def resolve_model(
    model_name_or_path: str | None,
    adapter_name_or_path: str | None,
    field: str = "model_name_or_path",
    adapter_field: str = "adapter_name_or_path",
) -> tuple[str, str, bool]:
    """Returns (base, source of config and tokenizer, whether that source is a LongQLoRA adapter folder).

    Raises:
        UserError: no such adapter, or a base model that is neither given nor recorded.
    """
    if adapter_name_or_path:
        check_adapter(adapter_name_or_path, adapter_field)
    record = read_record(adapter_name_or_path) if adapter_name_or_path else None
    base = model_name_or_path or (record["base_model"] if record else None)
    if not base:
        raise UserError(
            f"{field}: missing, and {adapter_name_or_path} does not record which base model it was trained on; name it"
        )
    check_source(base, field)
    return (base, adapter_name_or_path, True) if record and adapter_name_or_path else (base, base, False)


def load_for_inference(
    model_name_or_path: str | None, adapter_name_or_path: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `load_model` loads, and its tokenizer."""
    model = load_model(model_name_or_path, adapter_name_or_path, **options)
    return model, load_tokenizer(resolve_model(model_name_or_path, adapter_name_or_path)[1])


def load_model(
    model_name_or_path: str | None,
    adapter_name_or_path: str | None = None,
    *,
    context_size: int | None = None,
    load_in_4bit: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    field: str = "model_name_or_path",
    adapter_field: str = "adapter_name_or_path",
) -> PreTrainedModel:
    """A plain or merged model, or a base with an adapter, in eval mode with full attention.

    Args:
        model_name_or_path: None for the base that the adapter's record names.
        context_size: tokens to which a plain base is scaled, as in training. LongQLoRA's adapters and extended models
            record their own; a contradiction is an error.
        field, adapter_field: flags to name in error messages.

    Raises:
        UserError: a model that cannot be loaded, an adapter that does not fit, or contradictory context sizes.
    """
    base, source, is_ours = resolve_model(model_name_or_path, adapter_name_or_path, field, adapter_field)
    config = extended_config_of(source, context_size, is_fixed=is_ours, field=field)
    device = device or default_device()
    dtype = dtype or inference_dtype(device)
    model = load_base(base, config, dtype=dtype, load_in_4bit=load_in_4bit, device=device).eval()
    # of the model's own settings only the tokens that end a text count; transformers would use the others as defaults
    model.generation_config = GenerationConfig(eos_token_id=end_ids(model))
    return load_adapter(model, adapter_name_or_path) if adapter_name_or_path else model


def extended_config_of(
    source: str, context_size: int | None, *, is_fixed: bool = False, field: str = "model_name_or_path"
) -> PretrainedConfig:
    """The config in `source`, scaled to `context_size` tokens unless it is already extended.

    Args:
        is_fixed: the config belongs to a LongQLoRA adapter and must not be changed.

    Raises:
        UserError: `context_size` needs another factor than the config's own.
    """
    config = load_config(source, field)
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
