"""Which tokens does a token attend to during training? Shift short attention (S2-Attn), arXiv 2309.12307, section 3.2.

In the first half of the heads a token attends causally within its group of g tokens. In the second half the groups are
shifted by g/2. Twelve tokens, g = 4; a token attends to itself and to the earlier tokens of its group:

    token               0  1  2  3  4  5  6  7  8  9 10 11
    unshifted heads    [0  1  2  3][4  5  6  7][8  9 10 11]
    shifted heads      [0  1][2  3  4  5][6  7  8  9][10 11]

Each shifted group overlaps two unshifted ones, so information passes from group to group, layer by layer, and only to
later tokens. Deviation from the published code, which *rolls* the sequence in the shifted heads: there [10 11 0 1] is
one group, so token 0 sees the end of the text. Here nothing wraps around.

This module decides which tokens form a group: in packed documents, in grouped-query models, at any length. segment.py
computes attention inside the groups, and interface.py registers it with transformers.

Shapes: B batch, T tokens, H query heads, Hkv key/value heads, D head size, g group size in tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from component.attention.exchange import Exchange
from component.attention.segment import HeadCall, SavedAttention, Segment, attend_from_saved, attend_segments
from component.distributed.sequence import SequenceGroup
from component.error import UserError

HEAD_TOKENS = 2**20  # query heads x tokens of one kernel call: bounds the backward kernel's fp32 buffers


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
    """Causal attention inside groups; the second half of the heads uses groups shifted by half the group size.

    The unshifted heads are those of the first floor(Hkv/2) key/value heads; with a single key/value head, the first
    floor(H/2) query heads. Keys and values are never repeated for grouped-query models.

    Args:
        query: (B, H, T, D), after rotary embedding.
        key: (B, Hkv, T, D), after rotary embedding; H is a multiple of Hkv.
        value: (B, Hkv, T, D).
        group_size: g in tokens, even and at least 2. T can be any length; T <= g/2 is plain causal attention.
        position_ids: (B, T), or (1, T) for all rows. Each 0 starts a packed document: groups restart there, and no
            token attends to another document. None: each row is one document.
        scale: of the scores before the softmax; D ** -0.5 if None.
        dropout: probability of dropping an attention weight.
        saved_attention: filled by the first call. A second call with the same inputs reads it and runs no kernel.

    Returns:
        (B, T, H, D).

    Raises:
        UserError: g is odd or below 2.
    """
    check_group_size(group_size)
    documents = document_spans(position_ids) if position_ids is not None else None
    return attend_in_groups(query, key, value, group_size, documents, scale, dropout, saved_attention)


def check_group_size(group_size: int) -> None:
    if group_size < 2 or group_size % 2:
        raise UserError(f"group_size: {group_size} tokens cannot be halved for the shift; use an even number >= 2")


def document_spans(position_ids: Tensor) -> list[list[tuple[int, int]]] | None:
    """[start, end) of each document in each row of `position_ids` (B, T); None if every row is one document.

    Copies the positions to the CPU, so call it once per forward pass, not once per layer.
    """
    starts_document = position_ids == 0
    starts_document[:, 0] = True
    starts = [row.nonzero().flatten().tolist() for row in starts_document.cpu()]
    if all(len(row) == 1 for row in starts):
        return None
    return [list(zip(row, [*row[1:], position_ids.shape[1]], strict=True)) for row in starts]


def attend_in_groups(
    query, key, value, group_size, documents, scale, dropout, saved_attention, sequence: SequenceGroup | None = None
) -> Tensor:
    """`shift_short_attention` with document spans in place of positions.

    Args:
        documents: as returned by `document_spans`, one list per row or one for all; None: each row is one document.
        sequence: the processes that share the rows. Then T is this process's part, and `documents` are those of the
            whole rows; keys and values of groups that begin further left come from other processes.
    """
    if saved_attention is not None and saved_attention.is_filled:
        return attend_from_saved(query, key, value, scale, saved_attention)
    heads, kv_heads, tokens = query.shape[1], key.shape[1], query.shape[2]
    size, rank = (sequence.size, sequence.rank) if sequence else (1, 0)
    documents = documents or [[(0, size * tokens)]]
    documents = documents * len(query) if len(documents) == 1 else documents
    kv_per_call = max(1, HEAD_TOKENS // tokens // (heads // kv_heads))
    kv_per_call = min(kv_per_call, max(1, kv_heads - kv_heads // 2))  # memory plans count on at most half of the heads
    here = (rank * tokens, (rank + 1) * tokens)
    calls = []
    for half in _halves(heads, kv_heads, documents, group_size):
        groups = [_inside(here, _groups(spans, half.first_group, group_size)) for spans in documents]
        needed = _needed(half, documents, group_size, tokens, size) if sequence else ()
        for q, kv in _split_heads(half.heads, half.kv_heads, kv_per_call):
            rows = [[Segment(row, q, kv, *group) for group in parts] for row, parts in enumerate(groups)]
            calls.append(HeadCall(rows, Exchange(sequence, kv, needed) if sequence and any(needed) else None))
    return attend_segments(calls, query, key, value, scale, dropout, saved_attention)


class _Half(NamedTuple):
    """Heads with the same groups."""

    heads: slice
    kv_heads: slice
    first_group: int  # length of each document's first group in tokens, if it is shorter; else 0


def _halves(heads: int, kv_heads: int, documents, group_size: int) -> list[_Half]:
    """Unshifted and shifted heads."""
    half = group_size // 2
    if all(end - start <= half for spans in documents for start, end in spans):
        # both halves have one group per document: no need to split
        return [_Half(slice(0, heads), slice(0, kv_heads), 0)]
    unshifted_kv = kv_heads // 2
    unshifted = unshifted_kv * (heads // kv_heads) if kv_heads > 1 else heads // 2
    halves = [
        _Half(slice(0, unshifted), slice(0, unshifted_kv or 1), 0),
        _Half(slice(unshifted, heads), slice(unshifted_kv, kv_heads), half),
    ]
    return halves if unshifted else halves[1:]  # a single query head is a shifted one


def _split_heads(heads: slice, kv_heads: slice, kv_per_call: int) -> Iterator[tuple[slice, slice]]:
    """Query heads and their key/value heads, at most `kv_per_call` of the latter at a time."""
    count = kv_heads.stop - kv_heads.start
    per_kv = (heads.stop - heads.start) // count
    for first in range(0, count, kv_per_call):
        last = min(first + kv_per_call, count)
        q = slice(heads.start + first * per_kv, heads.start + last * per_kv)
        yield q, slice(kv_heads.start + first, kv_heads.start + last)


def _groups(spans, first_group: int, group_size: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(start, group lengths) of each document's shorter first group, its full groups, and the remainder."""
    for start, end in spans:
        head = min(first_group, end - start)
        full, tail = divmod(end - start - head, group_size)
        for lengths in ((head,), (group_size,) * full, (tail,)):
            if sum(lengths):
                yield start, lengths
                start += sum(lengths)


def _inside(here: tuple[int, int], groups) -> list[tuple[int, tuple[int, ...], int]]:
    """The part of `groups` in the tokens [first, last) of `here`: (start, group lengths, tokens left of it).

    Starts are counted from `first`. Only a group cut by it has tokens left of it, and is a part of its own.
    """
    first, last = here
    parts = []
    for start, lengths in groups:
        size = lengths[0]
        begin, end = max(start, first), min(start + sum(lengths), last)
        if begin >= end:
            continue
        left = (begin - start) % size
        cut = min(size - left, end - begin) if left else 0
        full, rest = divmod(end - begin - cut, size)
        for part, before in (((cut,), left), ((size,) * full, 0), ((rest,), 0)):
            if sum(part):
                parts.append((begin - first, part, before))
                begin += sum(part)
    return parts


def _needed(half: _Half, documents, group_size: int, tokens: int, processes: int) -> tuple[int, ...]:
    """How many tokens directly left of its own each process needs, if it holds `tokens` of each row."""
    return tuple(
        max(_left_of(rank * tokens, spans, half.first_group, group_size) for spans in documents)
        for rank in range(processes)
    )


def left_tokens(group_size: int, tokens: int, processes: int) -> tuple[int, int]:
    """What a process needs at most from its left, in unshifted and in shifted heads; it holds `tokens` of each row."""
    documents = [[(0, tokens * processes)]]
    unshifted, shifted = (
        max(_needed(half, documents, group_size, tokens, processes)) for half in _halves(2, 2, documents, group_size)
    )
    return unshifted, shifted


def _left_of(token: int, spans, first_group: int, group_size: int) -> int:
    """How many tokens of `token`'s group come before it."""
    before = token - max(start for start, _ in spans if start <= token)
    return before if before < first_group else (before - first_group) % group_size
