"""How is a model loaded for use? A plain or merged one, or a base with its adapter, at the context it was made for."""

import gc
import math
import os
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from component.adapter import check_adapter, load_adapter
from component.checkpoint import read_record
from component.error import UserError
from component.model import load_base, load_config
from component.rope import context_length, extend_context, is_trained_scaling, original_context, rope_factor
from component.tokenizer import load_tokenizer


def free_memory() -> None:
    """Give back what a model held that nobody names any more: the next one wants the room."""
    gc.collect()  # modules and their hooks refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def recorded_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """How the model was taught to chat: as the record beside its tokenizer says; Vicuna's way where there is none."""
    record = read_record(tokenizer.name_or_path) or {}
    return record.get("template") or "vicuna"


def default_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def inference_dtype(device: torch.device) -> torch.dtype:
    """fp16 on GPUs, as the published models; fp32 on the CPU, where half precision is slow."""
    return torch.float16 if device.type == "cuda" else torch.float32


def resolve_model(
    model_name_or_path: str | None,
    adapter_name_or_path: str | None,
    field: str = "model_name_or_path",
    adapter_field: str = "adapter_name_or_path",
) -> tuple[str, str, bool]:
    """The base, where config and tokenizer come from, and whether that is an adapter of ours.

    Raises:
        UserError: an adapter that is none, or no base named and none known.
    """
    if adapter_name_or_path:
        check_adapter(adapter_name_or_path, adapter_field)
    record = read_record(adapter_name_or_path) if adapter_name_or_path else None
    base = model_name_or_path or (record["base_model"] if record else None)
    if not base:
        raise UserError(
            f"{field}: missing, and {adapter_name_or_path} does not say which base model it belongs to; name one"
        )
    # our folders hold config and tokenizer
    return (base, adapter_name_or_path, True) if record and adapter_name_or_path else (base, base, False)


def load_for_inference(
    model_name_or_path: str | None, adapter_name_or_path: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `load_model` loads, and its tokenizer."""
    model = load_model(model_name_or_path, adapter_name_or_path, **options)
    fields = {name: options[name] for name in ("field", "adapter_field") if name in options}
    own = resolve_model(model_name_or_path, adapter_name_or_path, **fields)[1]
    return model, load_tokenizer(own, field=options.get("field", "model_name_or_path"))


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
    """A plain or merged model, or a base with an adapter around it, evaluating with full attention.

    Args:
        model_name_or_path: None takes the base that the adapter's record names.
        context_size: in tokens; stretches a base as training would. Our own adapters and extended models already say
            how far they are stretched, so there it is not needed, and a contradiction is an error.
        field, adapter_field: the flags that named the two, for messages.

    Raises:
        UserError: nothing loadable, an adapter that does not fit, or contradictory context sizes.
    """
    base, own, is_ours = resolve_model(model_name_or_path, adapter_name_or_path, field, adapter_field)
    config = extended_config_of(own, context_size, is_fixed=is_ours, field=field)
    device = device or default_device()
    dtype = dtype or inference_dtype(device)
    model = load_base(base, config, dtype=dtype, load_in_4bit=load_in_4bit, device=device).eval()
    return load_adapter(model, adapter_name_or_path) if adapter_name_or_path else model


def extended_config_of(
    source: str, context_size: int | None, *, is_fixed: bool = False, field: str = "model_name_or_path"
) -> PretrainedConfig:
    """The config in `source`, stretched to `context_size` tokens unless it already says how far it is stretched.

    Args:
        is_fixed: the config is that of an adapter of ours and must not be changed.

    Raises:
        UserError: `context_size` asks for another factor than an extended config was made for.
    """
    config = load_config(source, field)
    if not context_size or context_size < 0:
        return config
    made_for = rope_factor(config)
    if made_for == 1.0 and not is_fixed:
        extend_context(config, context_size)
        return config
    factor = math.ceil(context_size / original_context(config))
    if factor != made_for and not (is_trained_scaling(config) and context_size <= context_length(config)):
        raise UserError(
            f"context_size: {context_size} tokens need factor {factor}, but {source} was made for "
            f"{context_length(config)} tokens (factor {made_for:g}); leave context_size out"
        )
    return config
