"""Which config does a merged model need so that every engine computes the same?

transformers 5 reads `rope_parameters`; transformers 4 reads the top-level `rope_theta` and `rope_scaling`, and without
them leaves positions unscaled, in silence. vLLM and llama.cpp derive the longest prompt from max_position_embeddings,
which vLLM no longer multiplies for yarn (its pull request 56446). `dynamic` scales positions by the length of each
prompt, which no engine does for cached keys.
"""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from component.rope import context_length, ntk_theta, original_context, rope_factor, rope_parameters
from component.storage.atomic import atomic_file
from component.storage.foreign import read_object

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
LEGACY = ("rope_theta", "rope_scaling")
# transformers 5's name -> the same class in transformers 4
TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def served_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of an extended config that other engines read as transformers 5 reads `config`.

    yarn's `max_position_embeddings` becomes the extended length. `dynamic` is frozen: its frequencies for the extended
    length L become the model's own, exact at L and slightly worse for texts much shorter than L. linear's stays the
    original length, which all engines but llama.cpp's server multiply. A raised base frequency with unscaled positions
    is read like that of a base: `config` must have the extended length already.
    """
    served = copy.deepcopy(config)
    parameters, longest = rope_parameters(config), context_length(config)
    kind = parameters.get("rope_type", "default")
    if kind == "yarn":
        served.max_position_embeddings = longest
    elif kind == "dynamic":
        kept = {key: value for key, value in parameters.items() if key == "partial_rotary_factor"}
        served.rope_parameters = {**kept, "rope_type": "default", "rope_theta": frozen_theta(config, longest)}
        served.max_position_embeddings = longest
    return served


def frozen_theta(config: PretrainedConfig, tokens: int) -> float:
    """The base of the rotary frequencies that `dynamic` scaling uses for a text of `tokens` tokens.

    theta (f L / original - (f - 1))^(d / (d - 2)), with factor f and d rotated dimensions per head: "dynamic NTK" of
    transformers' modeling_rope_utils.
    """
    factor = rope_factor(config)
    return ntk_theta(config, factor * tokens / original_context(config) - (factor - 1))


def add_legacy_keys(folder: Path) -> None:
    """Write what transformers 4 reads into config.json and tokenizer_config.json; `save_pretrained` leaves it out."""
    for name, changed in (CONFIG, with_legacy_rope), (TOKENIZER_CONFIG, with_legacy_tokenizer):
        if (folder / name).is_file():
            _write(folder / name, changed(read_object(folder / name)))


def with_legacy_rope(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json with transformers 4's keys beside `rope_parameters`."""
    parameters = dict(values.get("rope_parameters") or {})
    theta = parameters.pop("rope_theta", None)
    legacy = {"rope_theta": theta, "rope_scaling": None if parameters.get("rope_type") == "default" else parameters}
    return {key: value for key, value in values.items() if key not in LEGACY} | (legacy if theta else {})


def with_legacy_tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 reads as transformers 5 does."""
    kind, extra = values.get("tokenizer_class"), values.get("extra_special_tokens")
    if kind in TOKENIZER_CLASSES:
        values = values | {"tokenizer_class": TOKENIZER_CLASSES[kind]}
    if isinstance(extra, list):  # transformers 4 expects a dict under that name, and fails
        rest = {key: value for key, value in values.items() if key != "extra_special_tokens"}
        values = rest | {"additional_special_tokens": extra}
    return values


def problems_elsewhere(folder: Path, config: PretrainedConfig) -> list[str]:
    """What other engines would read wrongly in an existing merged model, whose config is `config`."""
    values, served, found = read_object(folder / CONFIG), served_config(config), []
    kind = rope_parameters(config).get("rope_type", "default")
    if kind == "dynamic":
        found.append("rope_type is dynamic, which vLLM computes wrongly and llama.cpp not at all")
    elif config.max_position_embeddings != served.max_position_embeddings:
        found.append(
            f"max_position_embeddings is {config.max_position_embeddings}, not {served.max_position_embeddings}: vLLM "
            "does not start, and llama-server stops at the shorter length"
        )
    if any(key not in values for key in LEGACY):
        found.append("rope_theta and rope_scaling are missing, so transformers 4 does not scale positions")
    tokenizer = read_object(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    found += [
        f"{key} in {TOKENIZER_CONFIG} is unknown to transformers 4"
        for key, value in tokenizer.items()
        if with_legacy_tokenizer(tokenizer).get(key) != value
    ]
    return found


def renew_config(folder: Path, config: PretrainedConfig) -> None:
    """Rewrite config.json and tokenizer_config.json of an existing merged model, each atomically; no weights."""
    served, values = served_config(config), read_object(folder / CONFIG)
    rope = {"rope_parameters": served.rope_parameters, "max_position_embeddings": served.max_position_embeddings}
    _write(folder / CONFIG, with_legacy_rope(values | rope))
    add_legacy_keys(folder)


def _write(file: Path, values: dict[str, Any]) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
