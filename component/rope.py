"""By how much are rotary positions scaled?

Linear position interpolation (arXiv 2306.15595, section 2.2): position m enters the rotary embedding as m / factor, so
`factor` times as many tokens fall inside the position range of pretraining. transformers 5 stores this in
`config.rope_parameters`. For linear and dynamic scaling, transformers, vLLM and llama.cpp take
`max_position_embeddings` as the length *before* scaling, so it stays (or becomes) the original length; for scalings
that a base was pretrained with (llama3, longrope) it is the length *after* scaling.

A raised base frequency, rope_theta (arXiv 2309.16039, section 2), slows all rotations but the fastest. It can be the
only change (`theta`) or come with a scaling. A config does not say that its base was raised, nor how many tokens it is
good for: `longqlora.json` does.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from component.error import UserError, nearest

ROPE_TYPES = ("linear", "dynamic", "yarn")
THETA = "theta"  # in YAMLs and records: unscaled positions, raised base frequency; configs have type "default"


@dataclass(frozen=True)
class Scaling:
    """How a config scales positions."""

    rope_type: str
    factor: float
    context: int  # tokens that it supports

    def __str__(self) -> str:
        return "unscaled" if self.rope_type == "default" else f"{self.rope_type} x {self.factor:g}"


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


def scaling(config: PretrainedConfig) -> Scaling:
    return Scaling(_rope_type(config), rope_factor(config), context_length(config))


def _rope_type(config: PretrainedConfig) -> str:
    return rope_parameters(config).get("rope_type") or "default"


def original_context(config: PretrainedConfig) -> int:
    """The base's pretraining length in tokens, looking through any scaling already in the config."""
    return rope_parameters(config).get("original_max_position_embeddings") or config.max_position_embeddings


def rope_factor(config: PretrainedConfig) -> float:
    """The current scaling factor; 1.0 without scaling."""
    factor = rope_parameters(config).get("factor")
    if not factor and _rope_type(config) in ("yarn", "longrope"):  # as transformers infers it
        factor = config.max_position_embeddings / original_context(config)
    return float(factor or 1.0)


def context_length(config: PretrainedConfig) -> int:
    """The context in tokens that the config supports, including its scaling."""
    if is_trained_scaling(config):
        return config.max_position_embeddings
    return max(int(original_context(config) * rope_factor(config)), config.max_position_embeddings)


def is_trained_scaling(config: PretrainedConfig) -> bool:
    """Whether the base was pretrained with its scaling; then `max_position_embeddings` already includes it."""
    return _rope_type(config) not in ("default", *ROPE_TYPES)


def own_rope_type(config: PretrainedConfig) -> str:
    """The rope type of a config that is already scaled, else linear.

    Training a scaled model further, e.g. on chats or to a longer context, keeps the scaling that it was trained with.
    """
    own = _rope_type(config)
    return "linear" if own == "default" else own


def depends_on_length(config: PretrainedConfig, tokens: int) -> bool:
    """Whether all positions of a batch are scaled by its longest row, in batches of rows of up to `tokens` tokens."""
    return _rope_type(config) in ("dynamic", "longrope") and tokens > original_context(config)


def extend_context(
    config: PretrainedConfig,
    target_tokens: int,
    rope_type: str = "linear",
    field: str = "model_max_length",
    rope_theta: float | None = None,
) -> float:
    """Scale the positions of `config`, in place, so that `target_tokens` tokens fit.

    The factor is ceil(target / original), as in the original project, and absolute: for an already extended config it
    is relative to the base's original length, so extending twice changes nothing. A config is never scaled less than
    before, and a scaling of the same type keeps its other parameters. llama3's factor is not relative to its original
    length: what is raised is the factor that it was pretrained with. The config is unchanged if the original length
    covers the target, or if a scaling of type `rope_type`, or one that the base was pretrained with, does.

    Args:
        config: of a Llama-family model.
        target_tokens: target context in tokens.
        rope_type: `linear` (2306.15595), `dynamic` (NTK-aware, depends on the current length) or `yarn` (2309.00071);
            `theta` (unscaled, with a raised `rope_theta`); or the config's own.
        field: key or flag of the target, for error messages.
        rope_theta: the raised base frequency; None: the config's own.

    Returns:
        The resulting factor.

    Raises:
        UserError: unknown `rope_type`, a target below 1, a model without a single rotary embedding, a scaling that
            the base was pretrained with and that cannot be extended, or a `rope_theta` that is missing or too small.
    """
    known = (*ROPE_TYPES, THETA)
    if rope_type not in known and rope_type != own_rope_type(config):
        raise UserError(f"rope_type: {rope_type!r} is none of {', '.join(known)}{nearest(rope_type, known)}")
    if target_tokens < 1:
        raise UserError(f"{field}: {target_tokens} tokens; a context has at least 1")
    own, original = scaling(config), original_context(config)
    covered = own.context if is_trained_scaling(config) or rope_type == own.rope_type else original
    if target_tokens <= max(covered, original):
        return own.factor
    if is_trained_scaling(config):
        _refuse_theta(own, rope_theta)
        return _extend_trained_scaling(config, own, target_tokens, rope_type, field)
    factor = max(float(math.ceil(target_tokens / original)), own.factor)
    # of another type's scaling only what belongs to the architecture is kept
    names = config.rope_parameters if rope_type == own.rope_type else ("rope_theta", "partial_rotary_factor")
    kept: dict[str, Any] = {key: config.rope_parameters[key] for key in names if key in config.rope_parameters}
    kept.pop("type", None)  # transformers 4's name of rope_type, kept beside it when an old config is loaded
    if rope_theta is not None or rope_type == THETA:
        kept["rope_theta"] = _raised_theta(config, own, rope_theta, rope_type, factor)
    scaled = {"rope_type": "default"} if rope_type == THETA else {"rope_type": rope_type, "factor": factor}
    config.rope_parameters = {**kept, **scaled}
    if rope_type == "yarn":
        config.rope_parameters["original_max_position_embeddings"] = original
    config.max_position_embeddings = original
    return factor


def _raised_theta(
    config: PretrainedConfig, own: Scaling, rope_theta: float | None, rope_type: str, factor: float
) -> float:
    """`rope_theta`, checked: nothing is raised twice, or to less than it was."""
    theta = rope_parameters(config)["rope_theta"]
    if rope_type == THETA and own.rope_type != "default":
        raise UserError(
            f"rope_type: theta leaves positions unscaled, but the base is scaled {own}; leave rope_type out, and "
            "rope_theta raises the base frequency besides"
        )
    usual = f"NTK-aware for factor {factor:g} is {ntk_theta(config, factor):.0f}"
    if rope_theta is None:
        raise UserError(f"rope_type: theta needs rope_theta, above the base's own {theta:g}; {usual}")
    if not (math.isfinite(rope_theta) and rope_theta >= theta):
        raise UserError(
            f"rope_theta: {rope_theta:g} is less than the base's own {theta:g}, so fewer tokens would fit; {usual}"
        )
    return float(rope_theta)


def _refuse_theta(own: Scaling, rope_theta: float | None) -> None:
    if rope_theta is not None:
        raise UserError(
            f"rope_theta: {rope_theta:g} would change the frequencies that the base was pretrained with together with "
            f"its {own.rope_type} scaling; leave rope_theta out"
        )


def ntk_theta(config: PretrainedConfig, growth: float) -> float:
    """The base frequency at which the slowest rotation takes `growth` times as many tokens: NTK-aware scaling.

    theta growth^(d / (d - 2)), with d rotated dimensions per head (arXiv 2309.00071, section 3.1).
    """
    parameters = rope_parameters(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    return parameters["rope_theta"] * growth ** (rotated / (rotated - 2))


def _extend_trained_scaling(
    config: PretrainedConfig, own: Scaling, target_tokens: int, rope_type: str, field: str
) -> float:
    """Raise llama3's factor as many times as the context grows: its high frequencies stay as they were trained."""
    if own.rope_type != "llama3":
        raise UserError(
            f"{field}: {target_tokens} tokens, but the model was trained with {own.rope_type} positions, which cannot "
            f"be extended beyond its {own.context} tokens; use at most {own.context}, or another base model"
        )
    if rope_type != own.rope_type:
        raise UserError(
            f"rope_type: {rope_type} would replace the llama3 scaling that the model was trained with, and move "
            f"positions that it knows; leave rope_type out, and llama3's own factor is raised"
        )
    growth = math.ceil(target_tokens / own.context)
    config.rope_parameters = {**config.rope_parameters, "factor": own.factor * growth}
    config.max_position_embeddings = own.context * growth
    return own.factor * growth


def scaling_warnings(
    before: PretrainedConfig,
    after: PretrainedConfig,
    target_tokens: int,
    asked_type: str | None,
    asked_theta: float | None = None,
) -> list[str]:
    """Where positions that a scaled model knows may move otherwise than asked, after `extend_context`.

    Args:
        before, after: the base's config and the extended one.
        target_tokens: target context in tokens.
        asked_type: the rope type that the user asked for, None if any.
        asked_theta: the base frequency that the user asked for, None if any.
    """
    old, new, found = scaling(before), scaling(after), []
    if old.rope_type not in ("default", new.rope_type):
        found.append(
            f"{new} replaces {old}: positions that the model knows move by another factor than its context grows; "
            "to keep its scaling, leave rope_type out"
        )
    if asked_type not in (None, THETA, new.rope_type):
        found.append(f"rope_type: {asked_type} has no effect: the base covers {target_tokens} tokens, {old}")
    own_theta, theta = (config.rope_parameters["rope_theta"] for config in (before, after))
    if asked_type == THETA or asked_theta is not None:
        if asked_theta == own_theta:
            found.append(f"rope_theta: {own_theta:g} is the base's own, so nothing is raised")
        elif theta == own_theta:
            found.append(f"rope_theta has no effect: the base covers {target_tokens} tokens, {old}")
    length, is_explicit = before.max_position_embeddings, "original_max_position_embeddings" in before.rope_parameters
    if old.rope_type == "linear" and old.factor > 1 and length < target_tokens and not is_explicit:
        found.append(
            f"the base is scaled {old} with max_position_embeddings {length}, taken as its length before scaling "
            f"({old.context} tokens after). If {length} already counts the factor, add to its rope_parameters "
            f'"original_max_position_embeddings": {int(length / old.factor)}'
        )
    return found


def forget_lengths(model: nn.Module) -> None:
    """Make each forward pass of a model with dynamic scaling depend on its own length only.

    transformers keeps the scaling of the longest input so far, so losses would depend on earlier rows, and those of a
    resumed run would differ.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic" and hasattr(module, "original_inv_freq"):
            module.register_forward_pre_hook(_forget_length)


def _forget_length(rotary: Any, _: Any) -> None:
    rotary.max_seq_len_cached = rotary.original_max_seq_len
    rotary.inv_freq = rotary.original_inv_freq.to(rotary.inv_freq.device)
