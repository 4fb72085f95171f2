"""How does transformers call S2-Attn? As a registered attention and mask function, selected by the config.

`config._attn_implementation = "shift_short"` takes effect in training mode only. In evaluation and generation, modules
call stock SDPA with its usual mask.

Shapes: B batch, T tokens.
"""

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from component.attention.segment import SavedAttention
from component.attention.shift_short import attend_in_groups, check_group_size, document_spans
from component.attention.ulysses import heads_to_tokens, splits_heads, tokens_to_heads
from component.distributed.sequence import SequenceGroup, sequence_group
from component.error import UserError

NAME = "shift_short"
PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # no softcapping, attention sinks or local-attention layers
UNLIMITED = 2**40  # group size in tokens beyond any text: full attention


class TrainingMask:
    """The attention mask of one forward pass over full sequences, shared by all layers.

    transformers builds the mask before any layer says whether it is training. A layer in training mode reads padding
    and documents; one in evaluation mode takes `full`, the (B, 1, T, T) tensor for stock SDPA.
    """

    def __init__(self, padding: Tensor | None, build_full: Callable[[], Tensor | None]):
        self.padding = padding  # (B, T) bool, False for padding
        self._build_full = build_full
        self._documents: list | None = None
        self._documents_known = False

    @cached_property
    def full(self) -> Tensor | None:
        return self._build_full()

    def contiguous(self) -> Tensor | None:
        """Called by `generate` on its prepared masks, where stock SDPA's mask is needed."""
        return self.full

    @cached_property
    def is_right_padded(self) -> bool:
        """Whether no real token follows a padding token."""
        return self.padding is None or not bool((self.padding[:, 1:] & ~self.padding[:, :-1]).any())

    def documents(self, position_ids: Tensor | None) -> list | None:
        """The documents of whole rows, also if this process holds a part of them: a collective call then."""
        if position_ids is None:
            return None
        if position_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # in a CUDA graph each row is one document (component/train/graph.py)
        if not self._documents_known:
            sequence = sequence_group()
            rows = position_ids if sequence is None else sequence.gathered_tokens(position_ids)
            self._documents, self._documents_known = document_spans(rows), True
        return self._documents


def shift_short_mask(
    batch_size: int, q_length: int, kv_length: int, *args, attention_mask: Tensor | None = None, **kwargs
):
    """transformers' mask interface: a `TrainingMask` for full sequences, stock SDPA's mask while decoding."""

    def build_full() -> Tensor | None:
        return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)

    if q_length != kv_length:  # decoding with a KV cache
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
    """transformers' attention interface: S2-Attn if `module` is in training mode, stock SDPA otherwise.

    Where rows are split over processes, full attention by the same kernels takes the place of stock SDPA.

    Raises:
        UserError: left padding, holes in the mask, a 4D mask, a KV cache, softcapping or attention sinks in training.
    """
    sequence = sequence_group()
    if not module.training and sequence is None:
        mask = attention_mask.full if isinstance(attention_mask, TrainingMask) else attention_mask
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, position_ids=position_ids, **kwargs
        )
    if isinstance(attention_mask, Tensor) or query.shape[2] != key.shape[2]:
        raise UserError(
            "attention_mask: training with shift short attention supports neither a KV cache nor a custom 4D mask; "
            "pass a (batch, tokens) mask, or set use_shift_short_attention: false"
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UserError(
            f"use_shift_short_attention: {type(module).__name__} uses softcapping or attention sinks, which shift "
            "short attention does not support; set it to false"
        )
    documents = None
    if attention_mask is not None and module.training:
        if not attention_mask.is_right_padded:
            raise UserError(
                "attention_mask: left padding or holes; groups start at the first token, so training with shift short "
                "attention needs right padding (padding_side='right')"
            )
        documents = attention_mask.documents(position_ids)
    group_size = module.config.group_size if module.training else UNLIMITED
    attend = attend_in_groups if sequence is None else partial(attend_across_processes, sequence=sequence)
    return attend(query, key, value, group_size, documents, scaling, dropout, saved_attention), None


def attend_across_processes(
    query, key, value, group_size, documents, scale, dropout, saved_attention, *, sequence: SequenceGroup
) -> Tensor:
    """`attend_in_groups` if the rows are split over processes: each holds m = T/P tokens.

    Groups fetch what they need from the left. Full attention goes by heads, or fetches all keys and values from the
    left if the heads cannot be split; then the last process has the most work.
    """
    attend = partial(
        attend_in_groups,
        group_size=group_size,
        documents=documents,
        scale=scale,
        dropout=dropout,
        saved_attention=saved_attention,
    )
    is_full = group_size // 2 >= sequence.size * query.shape[2]
    if not (is_full and splits_heads(query.shape[1], key.shape[1], sequence.size)):
        return attend(query, key, value, sequence=sequence)
    inputs = (tokens_to_heads(tensor, sequence) for tensor in (query, key, value))
    return heads_to_tokens(attend(*inputs), sequence)


def use_shift_short_attention(config: PretrainedConfig, group_size: int | None, full_tokens: int = 0) -> None:
    """Select S2-Attn with groups of `group_size` tokens for models built from `config`.

    Args:
        group_size: None for full attention by the same kernels. Unlike Hugging Face's attention it stays inside packed
            documents and returns what a memory plan can keep.
        full_tokens: row length of the steps that train with full attention; 0 if there are none.

    Raises:
        UserError: an odd or too small group, or a model whose sliding window is shorter than a group or such a row.
    """
    if group_size is not None:
        check_group_size(group_size)
    window = sliding_window(config)
    if window is not None and window < max(group_size or 0, full_tokens):
        shorter = f"but the model's sliding window is {window}; "
        if window < (group_size or 0):
            raise UserError(f"group_size: {group_size} tokens, {shorter}use an even group_size of at most {window}")
        key = "full_attention_ratio" if group_size else "packing"
        raise UserError(f"{key}: full attention over rows of {full_tokens} tokens, {shorter}leave {key} out")
    config.group_size = group_size or UNLIMITED
    config._attn_implementation = NAME


def sliding_window(config: PretrainedConfig) -> int | None:
    """The model's own sliding window in tokens, or None."""
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def has_plain_attention(config: PretrainedConfig, tokens: int) -> bool:
    """Whether the model's own attention over rows of `tokens` tokens is plain causal full attention."""
    window = sliding_window(config)
    return config.model_type in PLAIN and (window is None or window >= tokens)


def use_full_attention(model: nn.Module) -> None:
    """Switch a model that trains with S2-Attn to full attention, still inside packed documents."""
    for module in model.modules():
        if getattr(module, "config", None) is not None and hasattr(module.config, "group_size"):
            module.config.group_size = UNLIMITED


AttentionInterface.register(NAME, shift_short_attention_forward)
AttentionMaskInterface.register(NAME, shift_short_mask)
