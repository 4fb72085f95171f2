"""By how much are rotary positions scaled?

Linear position interpolation (arXiv 2306.15595, section 2.2): position m enters the rotary embedding as m / factor, so
`factor` times as many tokens fall inside the position range of pretraining. transformers 5 stores this in
`config.rope_parameters`. transformers, vLLM and llama.cpp take `max_position_embeddings` as the length *before*
scaling, so it stays (or becomes) the original length.
"""

import math

from transformers import PretrainedConfig

from component.error import UserError, nearest

ROPE_TYPES = ("linear", "dynamic", "yarn")


def rope_parameters(config: PretrainedConfig) -> dict:
    """The config's rotary parameters; transformers normalizes older formats when it loads a config.

    Raises:
        UserError: the model has no rotary embedding, or one per layer type.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in parameters:
        raise UserError(
            f"model type {config.model_type!r} has no single rotary embedding whose positions could be scaled; "
            "use a model of the Llama family (llama, mistral, qwen2, qwen3)"
        )
    return parameters


def original_context(config: PretrainedConfig) -> int:
    """The base's pretraining length in tokens, looking through any scaling already in the config."""
    return rope_parameters(config).get("original_max_position_embeddings") or config.max_position_embeddings


def rope_factor(config: PretrainedConfig) -> float:
    """The current scaling factor; 1.0 without scaling."""
    return float(rope_parameters(config).get("factor") or 1.0)


def context_length(config: PretrainedConfig) -> int:
    """The context in tokens that the config supports, including its scaling."""
    if is_trained_scaling(config):
        return config.max_position_embeddings
    return max(int(original_context(config) * rope_factor(config)), config.max_position_embeddings)


def is_trained_scaling(config: PretrainedConfig) -> bool:
    """Whether the base was pretrained with its scaling; then `max_position_embeddings` already includes it."""
    return rope_parameters(config).get("rope_type") in ("llama3", "longrope")


def own_rope_type(config: PretrainedConfig) -> str:
    """The config's rope type if it is one of ROPE_TYPES, else linear.

    Fine-tuning an extended model further, e.g. on chats, should keep the scaling that it was trained with.
    """
    own = rope_parameters(config).get("rope_type")
    return own if own in ROPE_TYPES else "linear"


def extend_context(config: PretrainedConfig, target_tokens: int, rope_type: str = "linear") -> float:
    """Scale the positions of `config`, in place, so that `target_tokens` tokens fit.

    The factor is ceil(target / original), as in the original project, and absolute: for an already extended config it
    is relative to the base's original length, so extending twice changes nothing. The config is unchanged if the
    original length covers the target, or if a scaling that the base was pretrained with (llama3, longrope) does;
    a linear one would discard that.

    Args:
        config: of a Llama-family model.
        target_tokens: target context in tokens.
        rope_type: `linear` (2306.15595), `dynamic` (NTK-aware, depends on the current length) or `yarn` (2309.00071).

    Returns:
        The resulting factor.

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
    # partial_rotary_factor belongs to the architecture; everything else of the old scaling is dropped
    kept = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    config.rope_parameters = {**kept, "rope_type": rope_type, "factor": factor}
    if rope_type == "yarn":
        config.rope_parameters["original_max_position_embeddings"] = original
    config.max_position_embeddings = original
    return factor
