"""By how much are rotary positions scaled?

Linear position interpolation (arXiv 2306.15595, section 2.2): position m is fed to the rotary embedding as m / factor,
so that `factor` times as many tokens fall inside the range of positions the model was pretrained on. transformers 5
keeps this in `config.rope_parameters`, which stock transformers, vLLM and llama.cpp read. All of them take
`max_position_embeddings` as the length *before* stretching, so it stays (or becomes) the original length.
"""

import math

from transformers import PretrainedConfig

from component.error import UserError, nearest

ROPE_TYPES = ("linear", "dynamic", "yarn")


def rope_parameters(config: PretrainedConfig) -> dict:
    """The config's one set of rotary parameters, whatever the age of its spelling.

    Raises:
        UserError: the model has no rotary embedding, or one per layer type.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in parameters:
        raise UserError(
            f"model type {config.model_type!r} has no single rotary embedding whose positions could be stretched; "
            "use a model of the Llama family (llama, mistral, qwen2, qwen3)"
        )
    return parameters


def original_context(config: PretrainedConfig) -> int:
    """The length in tokens that the base was pretrained at, read through any scaling already there."""
    return rope_parameters(config).get("original_max_position_embeddings") or config.max_position_embeddings


def rope_factor(config: PretrainedConfig) -> float:
    """By how much positions are stretched now; 1.0 without scaling."""
    return float(rope_parameters(config).get("factor") or 1.0)


def context_length(config: PretrainedConfig) -> int:
    """The length in tokens that the config covers, its scaling included."""
    if is_trained_scaling(config):
        return config.max_position_embeddings
    return max(int(original_context(config) * rope_factor(config)), config.max_position_embeddings)


def is_trained_scaling(config: PretrainedConfig) -> bool:
    """A frequency-wise scaling that the model was trained with; `max_position_embeddings` counts it in already."""
    return rope_parameters(config).get("rope_type") in ("llama3", "longrope")


def own_rope_type(config: PretrainedConfig) -> str:
    """How a model's positions are stretched already, where it is by one of ROPE_TYPES; else linear.

    A model that was extended has learnt its own spacing: tuned further, as for chats, it should keep it.
    """
    own = rope_parameters(config).get("rope_type")
    return own if own in ROPE_TYPES else "linear"


def extend_context(config: PretrainedConfig, target_tokens: int, rope_type: str = "linear") -> float:
    """Stretch the positions of `config`, in place, so that `target_tokens` tokens fit.

    The factor is ceil(target / original), as in the original project, and absolute: extending an extended config
    gives the factor from the base's own length, and extending twice changes nothing. A target that the original
    length already covers leaves the config alone, and so does one that a model's own frequency-wise scaling (llama3,
    longrope: scalings that it was trained with, and that a linear one would throw away) covers.

    Args:
        config: of a model of the Llama family; changed in place.
        target_tokens: wanted context in tokens.
        rope_type: `linear` (2306.15595), `dynamic` (NTK-aware, by the length at hand) or `yarn` (2309.00071).

    Returns:
        The factor in force.

    Raises:
        UserError: unknown `rope_type`, a target below 1, or a model without a single rotary embedding.
    """
    if rope_type not in ROPE_TYPES:
        raise UserError(f"rope_type: {rope_type!r} is none of {', '.join(ROPE_TYPES)}{nearest(rope_type, ROPE_TYPES)}")
    if target_tokens < 1:
        raise UserError(f"model_max_length: {target_tokens} tokens; a context has at least 1")
    parameters, original = rope_parameters(config), original_context(config)
    if target_tokens <= (context_length(config) if is_trained_scaling(config) else original):
        return rope_factor(config)
    factor = float(math.ceil(target_tokens / original))
    # partial_rotary_factor belongs to the architecture, everything else about the old scaling goes
    kept = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    config.rope_parameters = {**kept, "rope_type": rope_type, "factor": factor}
    if rope_type == "yarn":
        config.rope_parameters["original_max_position_embeddings"] = original
    config.max_position_embeddings = original
    return factor
