"""Which models cannot be trained with which keys? Checked on the config, before weights are loaded."""

import torch
from transformers import PretrainedConfig

from component.attention.interface import has_plain_attention
from component.error import UserError
from component.float8.product import is_fast
from component.memory.layer import supports_layers_of
from component.rope import depends_on_length
from component.train.argument import LongQLoRAArguments

ANY_LENGTH = 2**40  # tokens


def check_model(args: LongQLoRAArguments, extended: PretrainedConfig) -> None:
    """Refuse keys that the model of the config `extended`, whose positions are scaled, cannot be trained with.

    Raises:
        UserError: what the checks below say.
    """
    if args.position_skipping:
        check_skipping(extended, args.model_max_length)
    if args.in_float8:
        check_float8(extended, f"frozen_matmul: {args.frozen_matmul}")
    if args.cuda_graph:
        check_graph(extended, args.max_seq_length)
    check_split_rows(extended, args.max_seq_length, args.sequence_parallel_size)


def chosen_matmul(
    args: LongQLoRAArguments,
    config: PretrainedConfig,
    device: torch.device,
    bf16: bool,
    recorded: str | None = None,
) -> str:
    """`frozen_matmul`, with what `auto` means here in its place.

    Gradients of activations are multiplied in FP8 where that is faster: in bf16, by a GPU that can, in layers that
    memory plans support. What it changes is in train_args/README.md.

    Args:
        recorded: of the checkpoint that the run resumes, which `auto` follows if this GPU can.
    """
    if args.frozen_matmul != "auto":
        return args.frozen_matmul
    if recorded == "unquantized" or not (bf16 and args.memory_plan and supports_layers_of(config)):
        return "unquantized"
    return recorded or "fp8_backward" if is_fast(config.hidden_size, device) else "unquantized"


def check_skipping(extended: PretrainedConfig, context: int) -> None:
    """Refuse `position_skipping` for models in which a skip has another meaning.

    Args:
        context: tokens whose positions are covered.

    Raises:
        UserError: positions that depend on a row's length, or attention that does not reach over the context.
    """
    field = "position_skipping: true"
    if depends_on_length(extended, context):
        raise UserError(
            f"{field}, but {extended.rope_parameters['rope_type']} positions are scaled by the length of a row, which "
            "a skip would change; use rope_type: linear, yarn or theta"
        )
    if not has_plain_attention(extended, context):
        raise UserError(
            f"{field}, but {extended.model_type}'s own attention (a sliding window, softcapping, sinks) does not "
            f"reach over {context} tokens, or is not computed with skips; set it to false"
        )


def check_float8(extended: PretrainedConfig, key: str, cure: str = "set it to auto") -> None:
    """Refuse products in FP8 for models whose layers Hugging Face's own code computes.

    Args:
        key, cure: what the user wrote, and what to do.

    Raises:
        UserError: memory plans do not support its decoder layers.
    """
    if not supports_layers_of(extended):
        raise UserError(
            f"{key}, but memory plans, which multiply in FP8, do not support the decoder layers of model type "
            f"{extended.model_type!r}; {cure}"
        )


def check_graph(extended: PretrainedConfig, tokens: int) -> None:
    """Refuse `cuda_graph` for models that can't be recorded (component/train/graph.py); rows have up to `tokens`.

    Raises:
        UserError: positions are looked at in Python, layers are Hugging Face's, or attention drops weights.
    """
    field = "cuda_graph: true"
    if depends_on_length(extended, ANY_LENGTH):
        raise UserError(
            f"{field}, but {extended.rope_parameters['rope_type']} positions are scaled in Python, anew for each "
            "batch; set it to false, or use rope_type: yarn, linear or theta"
        )
    if not supports_layers_of(extended) or not has_plain_attention(extended, tokens):
        raise UserError(
            f"{field}, but layers or attention of model type {extended.model_type!r} are computed by Hugging Face's "
            "code; set it to false"
        )
    if getattr(extended, "attention_dropout", 0.0):
        raise UserError(f"{field}, but the model's attention_dropout draws random numbers; set it to false")


def check_split_rows(extended: PretrainedConfig, tokens: int, parts: int) -> None:
    """Refuse rows of `tokens`, each split over `parts` processes, for models that cannot be computed that way.

    Raises:
        UserError: positions depend on a row's length, or attention is not the plain one.
    """
    if parts == 1:
        return
    field = f"sequence_parallel_size: {parts}"
    if depends_on_length(extended, tokens):
        raise UserError(
            f"{field}, but {extended.rope_parameters['rope_type']} positions are scaled by the length of a row, which "
            "no process sees whole; use rope_type: yarn or linear"
        )
    if not has_plain_attention(extended, tokens):
        raise UserError(
            f"{field}, but {extended.model_type}'s own attention (a sliding window, softcapping, sinks) over rows of "
            f"{tokens} tokens is not split over processes; set it to 1"
        )
