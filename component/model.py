"""How are a base model's config and weights loaded, in 4 bits or not?

NF4 with double quantization: QLoRA (arXiv 2305.14314, section 3). PEFT's `prepare_model_for_kbit_training` is not
used: it casts norms and embeddings, and with them the residual stream, to fp32.
"""

import copy
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from component.error import UserError, first_line
from component.rope import forget_lengths, original_context
from component.storage.hub import check_source


def load_config(model_name_or_path: str, field: str = "model_name_or_path") -> PretrainedConfig:
    """The config of a base model.

    Raises:
        UserError: no readable config, or a model whose attention cannot be replaced.
    """
    check_source(model_name_or_path, field)
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{field}: {model_name_or_path!r} is not a readable model folder or hub id ({first_line(error)}); "
            "name a folder with config.json, or a hub id"
        ) from error
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if not getattr(model_class, "_supports_attention_backend", False):
        raise UserError(
            f"{field}: model type {config.model_type!r} does not use transformers' attention interface; "
            "use a model of the Llama family (llama, mistral, qwen2, qwen3)"
        )
    try:
        original_context(config)
    except UserError as error:  # no single rotary embedding
        raise UserError(f"{field}: {model_name_or_path!r}: {error}") from error
    return config


def load_base(
    model_name_or_path: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    load_in_4bit: bool,
    device: str | torch.device | None,
) -> PreTrainedModel:
    """Load the base's weights into the model of `config`; no weight is initialized randomly.

    Args:
        dtype: of the weights; with `load_in_4bit` the compute dtype, and that of the weights that are not quantized.
        device: of the weights; None leaves placement to ZeRO-3, which partitions while loading.

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
            ignore_mismatched_sizes=True,  # reported below
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        if "out of memory" in str(error):
            raise
        reason = " ".join(first_line(error).split())[:300]
        raise UserError(
            f"model_name_or_path: the weights of {model_name_or_path!r} do not load ({reason}); download them again"
        ) from error
    _check_loading(model_name_or_path, report)
    _disable_cpu_repacking(model)
    forget_lengths(model)
    return model


def _check_loading(model_name_or_path: str, report: dict) -> None:
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"model_name_or_path: the weights of {model_name_or_path!r} do not fit the config: {name} is "
            f"{tuple(found)} instead of {tuple(wanted)}; use the base model that the config or adapter belongs to"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model_name_or_path: {model_name_or_path!r} lacks {len(missing)} weights of its config, such as "
            f"{missing[0]}; download the model again"
        )


def _nf4(dtype: torch.dtype, is_partitioned: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # the dtype in which ZeRO-3 partitions and gathers 4-bit values
        bnb_4bit_quant_storage=dtype if is_partitioned else torch.uint8,
    )


def _disable_cpu_repacking(model: PreTrainedModel) -> None:
    """Keep 4-bit weights on the CPU as they were loaded.

    On CPUs with AVX-512, bitsandbytes permanently repacks weights at their first evaluation, with scales rounded to
    bf16. Losses after an evaluation would then differ from those of a run without it, or of a resumed run.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def compute_dtype(fp16: bool, bf16: bool) -> torch.dtype:
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The model of `config` on the meta device; unlike `from_config`, not partitioned under ZeRO-3."""
    with torch.device("meta"):
        return AutoModelForCausalLM._model_mapping[type(config)](copy.deepcopy(config))
