"""How are a base model's config and weights loaded, in 4 bits or not?

NF4 with double quantization: QLoRA (arXiv 2305.14314, section 3). PEFT's `prepare_model_for_kbit_training` is not
used: it casts norms and embeddings, and with them the residual stream, to fp32.
"""

import copy
import math
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from component.config import raw_config, read_config, read_generation_config
from component.error import UserError, naming, nearest
from component.quick_import import import_bitsandbytes
from component.rope import forget_lengths, original_context
from component.storage.foreign import reading
from component.storage.hub import check_links, check_source
from component.storage.tensor_reader import TensorRef, is_finite, model_tensors


def load_config(model_name_or_path: str, field: str = "model_name_or_path") -> PretrainedConfig:
    """The config of a base model, without what it says about kernels, code and quantization.

    Raises:
        UserError: no config of a model that can be built, a model whose attention cannot be replaced, or weights in a
            quantization that is not supported.
    """
    check_source(model_name_or_path, field)
    cure = "name a folder with the config.json of a model, or a hub id"
    with naming(field), reading(f"{field}: {model_name_or_path!r} has no usable config", cure):
        config = read_config(model_name_or_path)
    stored_quantization(model_name_or_path, field)  # refuses what load_base would, before data is read
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
    with reading(f"{field}: {model_name_or_path!r} has no usable config", cure):
        _check_buildable(config)
    return config


def _check_buildable(config: PretrainedConfig) -> None:
    """Build one layer of the model, without memory for weights, so that no value fails later.

    Raises:
        ValueError: an unknown activation or rope type, or rotary parameters out of range.
    """
    activation = getattr(config, "hidden_act", None)
    if activation is not None and activation not in ACT2FN:
        raise ValueError(f"hidden_act: {activation!r} is no activation of transformers{nearest(activation, ACT2FN)}")
    if not 0 <= getattr(config, "rms_norm_eps", 0) < 1:
        raise ValueError(f"rms_norm_eps: {config.rms_norm_eps!r} is not from 0 to 1")
    _check_rope(config.rope_parameters)
    probe = copy.deepcopy(config)
    layers = config.num_hidden_layers
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(probe, key, value[:1])  # one entry per layer
    probe.num_hidden_layers = 1
    without_weights(probe)


def _check_rope(parameters: dict[str, Any]) -> None:
    known = ("default", *ROPE_INIT_FUNCTIONS)
    if parameters.get("rope_type") not in known:
        raise ValueError(f"rope_type: {parameters.get('rope_type')!r} is none of {', '.join(known)}")
    for key in ("rope_theta", "factor", "original_max_position_embeddings"):
        value = parameters.get(key)
        if value is not None and (isinstance(value, bool) or not 0 < value <= 2**53 or not math.isfinite(value)):
            raise ValueError(f"{key}: {value!r} is no number above 0")


def stored_quantization(model_name_or_path: str, field: str = "model_name_or_path") -> dict[str, Any] | None:
    """How the weights of a model are quantized, by its own config.json; None for 16 or 32 bits.

    Raises:
        UserError: by another method than bitsandbytes' 4 bits; other methods load code that was made for them.
    """
    with reading(f"{field}: {model_name_or_path!r} has no usable config", "download it again"):
        stored = raw_config(model_name_or_path).get("quantization_config") or None
        if stored is not None and not isinstance(stored, dict):
            raise ValueError(f"quantization_config: {str(stored)[:100]!r} is no object")
    if stored is None:
        return None
    method = stored.get("quant_method", "bitsandbytes" if "load_in_4bit" in stored else None)
    if method == "bitsandbytes" and stored.get("load_in_4bit") is True:
        return stored
    bits = " to 8 bits" if method == "bitsandbytes" else ""
    raise UserError(
        f"{field}: the weights of {model_name_or_path!r} are quantized by {method!r}{bits}, which is not supported; "
        "name the 16-bit model, or one quantized to 4 bits by bitsandbytes"
    )


def load_base(
    model_name_or_path: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    load_in_4bit: bool,
    device: str | torch.device,
) -> PreTrainedModel:
    """Load the base's weights into the model of `config`; no weight is initialized randomly.

    Args:
        dtype: of the weights; with `load_in_4bit` the compute dtype, and that of the weights that are not quantized.

    Raises:
        UserError: weights that are missing or do not fit the config.
    """
    check_links(model_name_or_path)
    stored = stored_quantization(model_name_or_path)
    _check_stored(model_name_or_path, stored)
    options: dict[str, Any] = {"device_map": {"": device}}
    if load_in_4bit or stored:
        import_bitsandbytes()
    if load_in_4bit and not stored:
        options["quantization_config"] = training_quantization(dtype)
    config = copy.deepcopy(config)
    if stored:
        config.quantization_config = stored | {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    # not through AutoModelForCausalLM, which would add an adapter that lies in the same folder
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    generation = read_generation_config(model_name_or_path)
    problem = f"model_name_or_path: the weights of {model_name_or_path!r} do not load"
    with reading(problem, "download them again"):
        model, report = model_class.from_pretrained(
            model_name_or_path,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            generation_config=generation,
            ignore_mismatched_sizes=True,  # reported below
            **options,
        )
    _check_loading(model_name_or_path, report)
    disable_cpu_repacking(model)
    forget_lengths(model)
    check_finite(model, model_name_or_path)
    return model


def _check_stored(model_name_or_path: str, stored: dict[str, Any] | None) -> None:
    """Refuse weights stored otherwise than the config says, damaged files, and files outside of the folder."""
    names, source = model_tensors(model_name_or_path), f"the weights of {model_name_or_path!r}"
    if any(name.endswith(".qweight") for name in names):  # older ones say so in a file of their own
        raise UserError(
            f"model_name_or_path: {source} are quantized by GPTQ or AWQ, which is not supported; name the 16-bit model"
        )
    kind = stored and stored.get("bnb_4bit_quant_type", "fp4")
    if stored and not any(name.endswith(f".quant_state.bitsandbytes__{kind}") for name in names):
        raise UserError(
            f"model_name_or_path: {source} are not in 4 bits ({kind}), as its config.json says; download the model "
            "again, or remove quantization_config there if they are in 16 bits"
        )


def check_finite(model: PreTrainedModel, source: str) -> None:
    """Refuse weights that are infinite or NaN: every output would be NaN.

    Raises:
        UserError: there is one.
    """
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)  # NF4: the scales of its blocks
        values = parameter.data if state is None else (state.absmax if state.offset is None else state.offset)
        if not is_finite(values):
            raise not_finite(source, name, model.dtype)


def not_finite(source: str, name: str, dtype: torch.dtype) -> UserError:
    return UserError(
        f"{source}: {name} holds infinite or NaN values in {str(dtype).removeprefix('torch.')}; if the file has them "
        "too, download or train it again, else load it in bfloat16 or float32"
    )


def _check_loading(model_name_or_path: str, report: dict) -> None:
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"model_name_or_path: the weights of {model_name_or_path!r} do not fit the config: {name} is "
            f"{tuple(found)} instead of {tuple(wanted)}; use the base model that the config or adapter belongs to"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise lacking(model_name_or_path, missing)


def lacking(model_name_or_path: str, missing: list[str]) -> UserError:
    return UserError(
        f"model_name_or_path: {model_name_or_path!r} lacks {len(missing)} weights of its config, such as "
        f"{missing[0]}; download the model again"
    )


def training_quantization(dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> BitsAndBytesConfig:
    """NF4 with double quantization.

    Args:
        dtype: in which products with the dequantized weights are computed.
        storage: in which the 4-bit values are stored; it must be a floating point dtype for DeepSpeed to gather them.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def disable_cpu_repacking(model: PreTrainedModel) -> None:
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


def base_tensors(base: str, model: PreTrainedModel) -> dict[str, TensorRef]:
    """The base's tensors that belong to `model`, without a tied head, in the order of the files.

    Raises:
        UserError: a missing weight, or one of another shape.
    """
    wanted, found, tied = model.state_dict(), model_tensors(base), tied_names(model)
    for name in tied[1:]:
        if tied[0] not in found and name in found:  # saved under the head's name only
            found[tied[0]] = found[name]
        elif name in found and not torch.equal(found[tied[0]].read().float(), found[name].read().float()):
            raise UserError(  # transformers would not tie them
                f"model_name_or_path: the config of {base!r} says tie_word_embeddings: true, but {name} differs from "
                f"{tied[0]}; set it to false in config.json"
            )
        wanted.pop(name)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise lacking(base, missing)
    for name, tensor in wanted.items():
        if found[name].shape != tuple(tensor.shape):
            raise UserError(
                f"model_name_or_path: the weights of {base!r} do not fit the config: {name} is {found[name].shape} "
                f"instead of {tuple(tensor.shape)}; use the base model that the config or adapter belongs to"
            )
    unused = [name for name in found if name not in wanted and name not in tied and "rotary_emb" not in name]
    if unused:
        print(f"{base}: {len(unused)} tensors belong to no layer and are ignored: {unused[0]} ...", file=sys.stderr)
    ordered = sorted(wanted, key=lambda name: (str(found[name].file), found[name].start or 0))
    return {name: found[name] for name in ordered}


def tied_names(model: PreTrainedModel) -> list[str]:
    """The names of the embedding's and the head's weight, if they are tied; else an empty list."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not model.config.tie_word_embeddings:
        return []
    names = {module: f"{path}.weight" for path, module in model.named_modules()}
    return [names[embedding], names[head]]
