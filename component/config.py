"""What of a stranger's config.json is used? The keys of its model type, with values that a model can have.

Everything else is left out: names of kernels and code, how outputs look, and how weights are stored
(`quantization_config`, which component/model.py reads with the weights).
"""

from dataclasses import fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig

from component.error import UserError, nearest
from component.storage.foreign import read_object
from component.storage.hub import check_links, fetch

OLDER_KEYS = {  # read by transformers, though not fields of every config
    "head_dim", "original_max_position_embeddings", "partial_rotary_factor", "rope_local_base_freq", "rope_scaling",
    "rope_theta", "rotary_emb_base", "rotary_pct", "sliding_window_pattern", "torch_dtype",
}  # fmt: skip
NOT_OF_A_MODEL = {  # fields about outputs and classifiers
    "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "output_hidden_states", "problem_type",
    "return_dict",
}  # fmt: skip
GENERATION: dict[str, tuple[type, ...]] = {  # what of a generation_config.json is used
    **dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id", "top_k", "num_beams"], (int,)),
    **dict.fromkeys(["max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size"], (int,)),
    **dict.fromkeys(["length_penalty", "repetition_penalty", "temperature"], (int, float)),
    **dict.fromkeys(["min_p", "top_p", "typical_p"], (int, float)),
    "do_sample": (bool,),
}
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
LISTS = ("bos_token_id", "eos_token_id")
MOST_LAYERS = 1000
SIZES = {  # key: the largest value
    **dict.fromkeys(["vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"], 2**31 - 1),
    **dict.fromkeys(["num_attention_heads", "num_key_value_heads", "head_dim"], 2**16),
    "num_hidden_layers": MOST_LAYERS,
}


def raw_config(source: str) -> dict[str, Any]:
    """All that the config.json of a folder or hub id says.

    Raises:
        UserError: it is no JSON object.
        ValueError: there is none.
    """
    check_links(source)
    file = fetch(source, "config.json")
    if file is None:
        is_adapter = fetch(source, "adapter_config.json") is not None
        raise ValueError("it is an adapter, not a model" if is_adapter else "it has no config.json")
    return read_object(file)


def read_config(source: str) -> PretrainedConfig:
    """The config of a folder or hub id.

    Raises:
        ValueError: an unknown model type, or a value that no model can have; transformers raises any type of error.
    """
    values = raw_config(source)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        hint = nearest(str(kind), CONFIG_MAPPING)
        raise ValueError(f"its config.json has the model_type {kind!r}, which transformers does not know{hint}")
    config_class = CONFIG_MAPPING[kind]
    _check_values(values)
    return config_class.from_dict(_allowed(values, config_class), name_or_path=source)


def read_generation_config(source: str) -> GenerationConfig | None:
    """Sampling values and special tokens in the generation_config.json of a folder or hub id; None without one.

    Raises:
        UserError: a value that no model can have.
    """
    file = fetch(source, "generation_config.json")
    if file is None:
        return None
    values = {key: value for key, value in read_object(file).items() if key in GENERATION and value is not None}
    for key, value in values.items():
        kinds, parts = GENERATION[key], value if key in LISTS and isinstance(value, list) else [value]
        if any(type(part) not in kinds for part in parts):
            raise UserError(f"{file}: {key} is {str(value)[:100]!r}, not {KINDS[kinds[-1]]}; correct or remove it")
    return GenerationConfig(**values)


def _allowed(values: dict[str, Any], config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Those of `values` that a config of this type may set, also in the configs inside of it."""
    names = {field.name for field in fields(config_class)} - NOT_OF_A_MODEL
    names |= OLDER_KEYS | config_class.attribute_map.keys()
    return {
        key: _allowed(value, config_class.sub_configs[key])
        if key in config_class.sub_configs and isinstance(value, dict)
        else value
        for key, value in values.items()
        if key in names
    }


def _check_values(values: dict[str, Any]) -> None:
    for key, most in SIZES.items():
        value = values.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"{key}: {value!r} is no whole number from 1 to {most:,}")
    for key in ("dtype", "torch_dtype"):
        dtype = values.get(key)
        if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ValueError(f"{key}: {dtype!r} is no dtype of PyTorch")
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise ValueError(f"num_attention_heads: {heads} is no multiple of num_key_value_heads, {kv_heads}")
