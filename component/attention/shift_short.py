"""Which tokens does a token see while training? Shift short attention, S2-Attn (LongLoRA, arXiv 2309.12307, 3.2).

The first half of the heads attends causally inside groups of g tokens, the second half inside groups shifted by g/2.
Twelve tokens, g = 4; a token sees itself and those before it in its group:

    token               0  1  2  3  4  5  6  7  8  9 10 11
    unshifted heads    [0  1  2  3][4  5  6  7][8  9 10 11]
    shifted heads      [0  1][2  3  4  5][6  7  8  9][10 11]

Groups of one half straddle the borders of the other, so information passes from group to group, layer by layer, and
only ever to later tokens. Deviation from the published code: there the shifted heads *roll* the sequence, [10 11 0 1]
is one group, and token 0 learns about the end of the text. Here nothing wraps around.

This file says which tokens form a group: packed documents, grouped-query heads, last groups that are not full. How a
group is computed is in segment.py, and how transformers is told to train with it in interface.py.

Shapes: B batch, T tokens, H query heads, Hkv key/value heads, D head size, g group size in tokens.
"""

from collections.abc import Iterator

from torch import Tensor

from component.attention.segment import SavedAttention, Segment, attend_again, attend_segments
from component.error import UserError

HEAD_TOKENS = 2**20  # query heads x tokens of one kernel call: its own sums, in fp32 in the backward pass, stay small


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
    return attend_in_groups(query, key, value, group_size, documents, scale, dropout, saved_attention)


def check_group_size(group_size: int) -> None:
    if group_size < 2 or group_size % 2:
        raise UserError(
            f"group_size: {group_size} tokens; groups are shifted by half of that: use an even number >= 2"
        )


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


def attend_in_groups(query, key, value, group_size, documents, scale, dropout, saved_attention) -> Tensor:
    """`shift_short_attention` with documents in place of positions.

    Args:
        documents: as from `document_spans`, one list per row or one for all; None: each row is one document.
    """
    if saved_attention is not None and saved_attention.out is not None:
        return attend_again(query, key, value, scale, saved_attention)
    documents = documents or [[(0, query.shape[2])]]
    documents = documents * len(query) if len(documents) == 1 else documents
    rows = [_halves(row, query.shape[1], key.shape[1], spans, group_size) for row, spans in enumerate(documents)]
    return attend_segments(rows, query, key, value, scale, dropout, saved_attention)


def _halves(row: int, heads: int, kv_heads: int, spans, group_size: int) -> list[list[Segment]]:
    """The segments of the unshifted and of the shifted heads in a row whose documents are `spans`."""
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
