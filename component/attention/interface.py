"""How does transformers train with S2-Attn? As a registered attention and mask, selected through the config.

`config._attn_implementation = "shift_short"` acts in training mode only: modules that evaluate or generate call stock
SDPA with the mask that stock SDPA would have got.

Shapes: B batch, T tokens.
"""

from collections.abc import Callable
from functools import cached_property

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from component.attention.segment import SavedAttention
from component.attention.shift_short import attend_in_groups, check_group_size, document_spans
from component.error import UserError

NAME = "shift_short"
PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # models without capped scores, sinks or windows in some layers
NO_GROUPS = 2**40  # tokens of a group that no text ever fills: full attention


class TrainingMask:
    """What one forward pass over whole sequences knows about its mask, shared by all layers.

    The mask is built before any layer has said whether it trains: a training layer reads padding and documents, an
    evaluating one asks for the tensor (B, 1, T, T) that stock SDPA would have got.
    """

    def __init__(self, padding: Tensor | None, build_full: Callable[[], Tensor | None]):
        self.padding = padding  # (B, T) bool, False where a token is padding
        self._build_full = build_full
        self._documents: list | None = None
        self._documents_known = False

    @cached_property
    def full(self) -> Tensor | None:
        return self._build_full()

    def contiguous(self) -> Tensor | None:
        """`generate` asks its prepared masks for this; whoever generates wants the full one."""
        return self.full

    @cached_property
    def is_right_padded(self) -> bool:
        """True if no real token follows a padding token."""
        return self.padding is None or not bool((self.padding[:, 1:] & ~self.padding[:, :-1]).any())

    def documents(self, position_ids: Tensor | None) -> list | None:
        if not self._documents_known and position_ids is not None:
            self._documents, self._documents_known = document_spans(position_ids), True
        return self._documents


def shift_short_mask(
    batch_size: int, q_length: int, kv_length: int, *args, attention_mask: Tensor | None = None, **kwargs
):
    """transformers' mask interface: a `TrainingMask` for whole sequences, stock SDPA's mask while decoding."""

    def build_full() -> Tensor | None:
        return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)

    if q_length != kv_length:  # a cache is in use: nobody trains
        return build_full()
    return TrainingMask(attention_mask, build_full)


def shift_short_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TrainingMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    saved_attention: SavedAttention | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: S2 while `module` trains, stock SDPA otherwise.

    Raises:
        UserError: training with left padding, holes in the mask, a custom mask, a key-value cache or capped scores.
    """
    if not module.training:
        mask = attention_mask.full if isinstance(attention_mask, TrainingMask) else attention_mask
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, position_ids=position_ids, **kwargs
        )
    if isinstance(attention_mask, Tensor) or query.shape[2] != key.shape[2]:
        raise UserError(
            "attention_mask: shift short attention trains on whole rows, without a key-value cache and without a "
            "custom mask; pass (batch, tokens) masks, or set use_shift_short_attention: false"
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UserError(
            f"use_shift_short_attention: {type(module).__name__} caps its scores or adds sinks to them, which shift "
            "short attention does not; set it to false"
        )
    documents = None
    if attention_mask is not None:
        if not attention_mask.is_right_padded:
            raise UserError(
                "attention_mask: left padding or holes; groups are counted from the first token, so training with "
                "shift short attention needs right padding (padding_side='right')"
            )
        documents = attention_mask.documents(position_ids)
    out = attend_in_groups(query, key, value, module.config.group_size, documents, scaling, dropout, saved_attention)
    return out, None


def use_shift_short_attention(config: PretrainedConfig, group_size: int | None, full_tokens: int = 0) -> None:
    """Select S2 with groups of `group_size` tokens for the model that is built from `config`.

    Args:
        group_size: None for full attention by the same kernels, which, unlike Hugging Face's attention, stays inside
            packed documents and hands out what a memory plan can keep.
        full_tokens: of the rows that are to be trained with full attention, if any are.

    Raises:
        UserError: an odd or too small group, or a model whose sliding window is shorter than a group or such a row.
    """
    if group_size is not None:
        check_group_size(group_size)
    window = own_window(config)
    if window is not None and window < max(group_size or 0, full_tokens):
        shorter = f"but the model's own sliding window is {window}; "
        if window < (group_size or 0):
            raise UserError(f"group_size: {group_size} tokens, {shorter}use an even group_size of at most {window}")
        key = "full_attention_ratio" if group_size else "packing"
        raise UserError(f"{key}: full attention in rows of {full_tokens} tokens, {shorter}leave {key} out")
    config.group_size = group_size or NO_GROUPS
    config._attn_implementation = NAME


def own_window(config: PretrainedConfig) -> int | None:
    """Tokens of the model's own sliding window, None if it looks back without end."""
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def has_plain_attention(config: PretrainedConfig, tokens: int) -> bool:
    """Whether the model's own attention in rows of `tokens` tokens is causal, full, and nothing else besides."""
    window = own_window(config)
    return config.model_type in PLAIN and (window is None or window >= tokens)


def use_full_attention(model: nn.Module) -> None:
    """Switch a model that trains with S2 to full attention, still inside packed documents."""
    for module in model.modules():
        if getattr(module, "config", None) is not None and hasattr(module.config, "group_size"):
            module.config.group_size = NO_GROUPS


AttentionInterface.register(NAME, shift_short_attention_forward)
AttentionMaskInterface.register(NAME, shift_short_mask)
