"""Which tokens does a token see while training? Shift short attention, S2-Attn (LongLoRA, arXiv 2309.12307, 3.2).

The first half of the heads attends causally inside groups [0,g) [g,2g) ..., the second half inside groups moved by
half a group: [0,g/2) [g/2,3g/2) ... Deviation from the published code: there the second half is *rolled*, so that the
first half-group shares a group with the end of the text and, through the layers, every token learns of later ones.
Here nothing wraps around; the first and the last half-group stand alone.

It is a registered attention of transformers (`config._attn_implementation = "shift_short"`) and acts in training mode
only: evaluating modules call stock SDPA with the mask that stock SDPA would have got.

Shapes: B batch, T tokens, H query heads, Hkv key/value heads, D head size, g group size in tokens.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from component.attention import kernel
from component.attention.kernel import describe_kernels as describe_kernels
from component.attention.kernel import limit_kernels as limit_kernels
from component.attention.segment import AttentionMemo, FusedAttention, Run, with_kernels
from component.error import UserError

NAME = "shift_short"
PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # models without capped scores, sinks or windows in some layers
NO_GROUPS = 2**40  # tokens of a group that no text ever fills: full attention
HEAD_TOKENS = 2**20  # query heads x tokens of one kernel call: its own sums, in fp32 while going backward, stay small


def shift_short_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_size: int,
    position_ids: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    attention_memo: AttentionMemo | None = None,
) -> Tensor:
    """Causal attention inside groups, the second half of the heads in groups moved by half a group.

    The unshifted heads are those of the first floor(Hkv/2) key/value heads; with a single key/value head, the first
    floor(H/2) query heads. Keys and values are never repeated for grouped-query models.

    Args:
        query: (B, H, T, D), after rotary embedding.
        key: (B, Hkv, T, D), after rotary embedding; H is a multiple of Hkv.
        value: (B, Hkv, T, D).
        group_size: g in tokens, even and at least 2. T is any length; up to g/2 it is plain causal attention.
        position_ids: (B, T), or (1, T) for all rows alike. Where a position is 0 a packed document starts: its groups
            start there too, and no token sees another document. None: each row is one document.
        scale: of the scores before the softmax; D ** -0.5 if None.
        dropout: probability of dropping an attention weight.
        attention_memo: filled, or, where an earlier call with the same inputs has filled it, used in place of kernels.

    Returns:
        (B, T, H, D).

    Raises:
        UserError: g is odd or below 2.
    """
    check_group_size(group_size)
    documents = document_spans(position_ids) if position_ids is not None else None
    return _attend(query, key, value, group_size, documents, scale, dropout, attention_memo)


def check_group_size(group_size: int) -> None:
    if group_size < 2 or group_size % 2:
        raise UserError(f"group_size: {group_size} tokens; groups move by half of that: use an even number >= 2")


def document_spans(position_ids: Tensor) -> list[list[tuple[int, int]]] | None:
    """[start, end) of each document in each row of `position_ids` (B, T); None if every row is one document.

    Reads the positions back to the host: call it once per forward pass, not once per layer.
    """
    starts_document = position_ids == 0
    starts_document[:, 0] = True
    length = position_ids.shape[1]
    starts = [row.nonzero().flatten().tolist() for row in starts_document.cpu()]
    if all(len(row) == 1 for row in starts):
        return None
    return [list(zip(row, [*row[1:], length], strict=True)) for row in starts]


def _attend(query, key, value, group_size, documents, scale, dropout, memo) -> Tensor:
    """(B, T, H, D); `documents` as from `document_spans`, one list per row or one for all rows alike."""
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:  # as it does for SDPA
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if memo is not None and memo.out is not None:
        return FusedAttention.apply(query, key, value, memo.runs, scale, memo)
    documents = documents or [[(0, query.shape[2])]]
    documents = documents * len(query) if len(documents) == 1 else documents
    plan = [_halves(row, query.shape[1], key.shape[1], spans, group_size) for row, spans in enumerate(documents)]
    if dropout == 0:
        runs = [run for row in plan for half in row for run in with_kernels(half, query, key, value)]
        if all(run.kernel for run in runs):
            return FusedAttention.apply(query, key, value, runs, scale, memo)

    def attend(run: Run) -> Tensor:  # (t, h, D)
        return _causal(*run.inputs(query, key, value), scale, dropout).transpose(1, 2).flatten(0, 1)

    return torch.stack([torch.cat([torch.cat(list(map(attend, half))) for half in row], dim=1) for row in plan])


def _halves(row: int, heads: int, kv_heads: int, spans, group_size: int) -> list[list[Run]]:
    """The runs of the unshifted and of the shifted heads in a row whose documents are `spans`."""
    plain_kv = kv_heads // 2
    plain = plain_kv * (heads // kv_heads) if kv_heads > 1 else heads // 2
    half = group_size // 2
    halves = [(slice(0, plain), slice(0, plain_kv or 1), 0), (slice(plain, heads), slice(plain_kv, kv_heads), half)]
    if plain == 0:  # a single query head is of the shifted half
        del halves[0]
    if all(end - start <= half for start, end in spans):
        halves = [(slice(0, heads), slice(0, kv_heads), 0)]  # no group ends before its document: no need to split
    at_once = max(1, HEAD_TOKENS // spans[-1][1] // (heads // kv_heads))  # key/value heads in one kernel call
    at_once = min(at_once, max(1, kv_heads - plain_kv))  # never more than of two halves: plans count on that
    return [
        [Run(row, q, kv, start, lengths) for start, lengths in _groups(spans, first_group, group_size)]
        for all_q, all_kv, first_group in halves
        for q, kv in _portions(all_q, all_kv, at_once)
    ]


def _portions(heads: slice, kv_heads: slice, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Query heads and their key/value heads, `at_once` of the latter at a time."""
    count = kv_heads.stop - kv_heads.start
    per_kv = (heads.stop - heads.start) // count
    for first in range(0, count, at_once):
        last = min(first + at_once, count)
        q = slice(heads.start + first * per_kv, heads.start + last * per_kv)
        yield q, slice(kv_heads.start + first, kv_heads.start + last)


def _groups(spans, first_group: int, group_size: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Start and lengths: of each document's first group, if that is another length, its whole groups, and the rest."""
    for start, end in spans:
        head = min(first_group, end - start)
        whole, tail = divmod(end - start - head, group_size)
        for lengths in ((head,), (group_size,) * whole, (tail,)):
            if sum(lengths):
                yield start, lengths
                start += sum(lengths)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Causal attention by SDPA, (b, h, t, D): grouped heads without repeating keys and values where it can."""
    attend = F.scaled_dot_product_attention
    options: dict[str, Any] = {"is_causal": True, "scale": scale, "dropout_p": dropout}
    per_kv = query.shape[1] // key.shape[1]
    if per_kv == 1 or kernel.choose(query, key, value) != kernel.EFFICIENT:
        return attend(query, key, value, enable_gqa=per_kv > 1, **options)
    # The memory-efficient kernel knows no grouped heads: one call for each member of a group
    members = query.unflatten(1, (key.shape[1], per_kv)).unbind(2)
    return torch.stack([attend(member, key, value, **options) for member in members], dim=2).flatten(1, 2)


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
    attention_memo: AttentionMemo | None = None,
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
    out = _attend(query, key, value, module.config.group_size, documents, scaling, dropout, attention_memo)
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
    """What trains with S2 trains with full attention from now on, still inside packed documents."""
    for module in model.modules():
        if getattr(module, "config", None) is not None and hasattr(module.config, "group_size"):
            module.config.group_size = NO_GROUPS


AttentionInterface.register(NAME, shift_short_attention_forward)
AttentionMaskInterface.register(NAME, shift_short_mask)
