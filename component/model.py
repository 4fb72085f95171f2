"""How are base weights and tokenizer loaded, in 4 bits or not?

NF4 with double quantisation: QLoRA (arXiv 2305.14314, section 3). The base is never passed through PEFT's
`prepare_model_for_kbit_training`: that turns norms and embeddings, and with them the residual stream, into fp32.
"""

import copy
import math
import os
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from component.adapter import check_adapter, check_targets, load_adapter, without_weights
from component.checkpoint import read_record
from component.error import UserError, first_line
from component.rope import context_length, extend_context, is_trained_scaling, original_context, rope_factor


def load_config(model_name_or_path: str, field: str = "model_name_or_path") -> PretrainedConfig:
    """The config of a base model.

    Raises:
        UserError: nothing loadable there, or a model whose attention cannot be exchanged.
    """
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{field}: {model_name_or_path!r} is no model folder and no hub id that can be read here "
            f"({first_line(error)}); name a folder with config.json, or a hub id"
        ) from error
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if not getattr(model_class, "_supports_attention_backend", False):
        raise UserError(
            f"{field}: model type {config.model_type!r} does not take its attention from transformers' interface; "
            "use a model of the Llama family (llama, mistral, qwen2, qwen3)"
        )
    try:
        original_context(config)
    except UserError as error:  # no single rotary embedding
        raise UserError(f"{field}: {model_name_or_path!r}: {error}") from error
    return config


def load_tokenizer(
    model_name_or_path: str, model_max_length: int | None = None, field: str = "model_name_or_path"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model; its vocabulary stays as it is, pad token or none.

    Args:
        field: the flag that named the folder, for messages.

    Raises:
        UserError: no tokenizer there, or one without an end-of-sequence token.
    """
    options = {"padding_side": "right", "truncation_side": "right", "trust_remote_code": False}
    if model_max_length is not None:
        options["model_max_length"] = model_max_length
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(
            f"{field}: {model_name_or_path!r} holds no usable tokenizer ({first_line(error)}); "
            "fetch the model's tokenizer files into the same folder"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{field}: the tokenizer of {model_name_or_path!r} has no end-of-sequence token; "
            "give it one (eos_token in tokenizer_config.json)"
        )
    return tokenizer


def any_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to stand in padded places; they are masked by position, so which one does not matter."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def load_base(
    model_name_or_path: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    load_in_4bit: bool,
    device: str | torch.device | None,
) -> PreTrainedModel:
    """The base's weights under `config`; nothing is initialised at random.

    Args:
        dtype: of weights, or with `load_in_4bit` of what stays unquantised and of computing.
        device: where to put the weights; None leaves that to ZeRO-3, which partitions while loading.

    Raises:
        UserError: weights that are missing or do not fit the config.
    """
    options = {"quantization_config": _nf4(dtype, is_partitioned=device is None)} if load_in_4bit else {}
    if device is not None:
        options["device_map"] = {"": device}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            model_name_or_path,
            config=copy.deepcopy(config),
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in our words
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        if "out of memory" in str(error):
            raise
        reason = " ".join(first_line(error).split())[:300]
        raise UserError(
            f"model_name_or_path: the weights of {model_name_or_path!r} do not load ({reason}); fetch them again"
        ) from error
    _check_loading(model_name_or_path, report)
    _keep_packing(model)
    return model


def _check_loading(model_name_or_path: str, report: dict) -> None:
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"model_name_or_path: the weights of {model_name_or_path!r} do not fit the config: {name} is "
            f"{tuple(found)} instead of {tuple(wanted)}; use the base model that config or adapter belongs to"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model_name_or_path: {model_name_or_path!r} lacks {len(missing)} weights of its config, as {missing[0]}; "
            "fetch the model again"
        )


def _nf4(dtype: torch.dtype, is_partitioned: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # 4-bit values travel in this type when ZeRO-3 partitions and gathers them
        bnb_4bit_quant_storage=dtype if is_partitioned else torch.uint8,
    )


def _keep_packing(model: PreTrainedModel) -> None:
    """Leave 4-bit weights on the CPU as they were loaded.

    Where a CPU has AVX-512, bitsandbytes repacks them for good when they first evaluate, with scales rounded to bf16:
    the steps after an evaluation would differ from those of a run without it, and from those of a resumed one.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def compute_dtype(fp16: bool, bf16: bool) -> torch.dtype:
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32


def default_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def inference_dtype(device: torch.device) -> torch.dtype:
    """fp16 on GPUs, as the published models; fp32 on the CPU, where half precision is slow."""
    return torch.float16 if device.type == "cuda" else torch.float32


def locate(
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
    own = locate(model_name_or_path, adapter_name_or_path, **fields)[1]
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
    base, own, is_ours = locate(model_name_or_path, adapter_name_or_path, field, adapter_field)
    config = stretched_config(own, context_size, is_fixed=is_ours, field=field)
    device = device or default_device()
    dtype = dtype or inference_dtype(device)
    model = load_base(base, config, dtype=dtype, load_in_4bit=load_in_4bit, device=device).eval()
    return load_adapter(model, adapter_name_or_path) if adapter_name_or_path else model


def stretched_config(
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


def check_targets_early(config: PretrainedConfig, target_names: list[str] | None) -> None:
    """Refuse a target that is no linear layer of the model, before any weight is loaded."""
    if target_names is not None:
        check_targets(without_weights(config), target_names)
