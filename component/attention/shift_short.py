from collections.abc import Iterator

import torch
from torch import Tensor

from component.attention.kernel import describe_kernels as describe_kernels
from component.attention.kernel import limit_kernels as limit_kernels
from component.attention.segment import FusedAttention, SavedAttention, Segment, _causal, with_kernels
from component.error import UserError

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
    saved_attention: SavedAttention | None = None,
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
        saved_attention: filled by this call; if an earlier call with the same inputs filled it, no kernel runs.

    Returns:
        (B, T, H, D).

    Raises:
        UserError: g is odd or below 2.
    """
    check_group_size(group_size)
    documents = document_spans(position_ids) if position_ids is not None else None
    return _attend(query, key, value, group_size, documents, scale, dropout, saved_attention)


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


def _attend(query, key, value, group_size, documents, scale, dropout, saved_attention) -> Tensor:
    """(B, T, H, D); `documents` as from `document_spans`, one list per row or one for all rows alike."""
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:  # as it does for SDPA
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if saved_attention is not None and saved_attention.out is not None:
        return FusedAttention.apply(query, key, value, saved_attention.segments, scale, saved_attention)
    documents = documents or [[(0, query.shape[2])]]
    documents = documents * len(query) if len(documents) == 1 else documents
    plan = [_halves(row, query.shape[1], key.shape[1], spans, group_size) for row, spans in enumerate(documents)]
    if dropout == 0:
        segments = [segment for row in plan for half in row for segment in with_kernels(half, query, key, value)]
        if all(segment.kernel for segment in segments):
            return FusedAttention.apply(query, key, value, segments, scale, saved_attention)

    def attend(segment: Segment) -> Tensor:  # (t, h, D)
        return _causal(*segment.inputs(query, key, value), scale, dropout).transpose(1, 2).flatten(0, 1)

    return torch.stack([torch.cat([torch.cat(list(map(attend, half))) for half in row], dim=1) for row in plan])


def _halves(row: int, heads: int, kv_heads: int, spans, group_size: int) -> list[list[Segment]]:
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
        [Segment(row, q, kv, start, lengths) for start, lengths in _groups(spans, first_group, group_size)]
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
