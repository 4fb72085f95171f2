"""How does one new token attend to quantized blocks without dequantizing them to memory? A Triton kernel.

Each program reads some blocks of one key/value head, as they are stored, or the tokens after the last full block, and
writes their attention and log-sum-exp; a second kernel merges these (split-K decoding, as in Flash-Decoding,
https://pytorch.org/blog/flash-decoding). The numbers of a block are used as they are: with key = zero + scale code,
q key = q zero + (q scale) code, and likewise for values. Importing this module needs Triton, which comes with PyTorch
for CUDA.

Shapes: G rows x key/value heads, R query heads for each, D head size, P values per byte, S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from component.inference.quantized_layer import BLOCK, FIRST, Segment

SPLIT = FIRST  # blocks that one program reads, 512 tokens: a part of one segment


@triton.jit
def _numbers(address, type: tl.constexpr):
    """A segment's memory, which is aligned, by its address."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(type)), 16)


@triton.jit(do_not_specialize=["splits", "recent"])
def _attend(
    query,  # (G, R, D) of the scales' dtype
    recent_keys,  # (G, BLOCK, D), likewise
    recent_values,
    table,  # (S, 9) int64, see split_table
    out,  # (G, R, S + 1, D) fp32
    lse,  # (G, R, S + 1) fp32
    recent,
    splits,
    scaling,
    R: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    # channels as (groups that share a scale, D / GROUPS)
    channel = tl.arange(0, GROUPS)[:, None] * (D // GROUPS) + tl.arange(0, D // GROUPS)[None, :]
    if split == splits:  # the tokens after the last full block
        token = tl.arange(0, BLOCK)
        inside = (token < recent)[:, None, None]
        where = (head * BLOCK + token)[:, None, None] * D + channel[None, :, :]
        for r in tl.static_range(R):
            q = tl.load(query + (head * R + r) * D + channel).to(tl.float32) * scaling
            keys = tl.load(recent_keys + where, mask=inside, other=0.0).to(tl.float32)
            scores = tl.sum(tl.sum(keys * q[None, :, :], axis=2), axis=1)
            scores = tl.where(token < recent, scores, -float("inf"))
            highest = tl.max(scores, axis=0)
            weight = tl.exp(scores - highest)
            total = tl.sum(weight, axis=0)
            values = tl.load(recent_values + where, mask=inside, other=0.0).to(tl.float32)
            to = (head * R + r) * (splits + 1) + split
            tl.store(out + to * D + channel, tl.sum(weight[:, None, None] * values, axis=0) / total)
            tl.store(lse + to, highest + tl.log(total))
    else:
        _attend_to_blocks(query, table, out, lse, splits, scaling, R, D, GROUPS, BITS, BLOCK)


@triton.jit
def _attend_to_blocks(
    query,
    table,
    out,
    lse,
    splits,
    scaling,
    R: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    per_byte: tl.constexpr = 8 // BITS
    rows: tl.constexpr = BLOCK // per_byte  # bytes of a block and channel
    number: tl.constexpr = query.dtype.element_ty
    entry = table + split * 9
    key_codes, value_codes = _numbers(entry, tl.uint8), _numbers(entry + 3, tl.uint8)
    key_scale, key_zero = _numbers(entry + 1, number), _numbers(entry + 2, number)
    value_scale, value_zero = _numbers(entry + 4, number), _numbers(entry + 5, number)
    first = head * tl.load(entry + 6)
    begin, end = first + tl.load(entry + 7), first + tl.load(entry + 8)
    group = tl.arange(0, GROUPS)
    channel = group[:, None] * (D // GROUPS) + tl.arange(0, D // GROUPS)[None, :]
    row = tl.arange(0, rows)
    for r in tl.static_range(R):
        q = tl.load(query + (head * R + r) * D + channel).to(tl.float32) * scaling
        highest = -float("inf")
        total = 0.0
        summed = tl.zeros([GROUPS, D // GROUPS], dtype=tl.float32)
        for at in range(begin, end):
            scaled = q * tl.load(key_scale + at * D + channel).to(tl.float32)
            offset = tl.sum(tl.sum(q * tl.load(key_zero + at * D + channel).to(tl.float32), axis=1), axis=0)
            where = (at * rows + row)[:, None, None] * D + channel[None, :, :]
            keys = tl.load(key_codes + where)
            values = tl.load(value_codes + where)
            for part in tl.static_range(per_byte):
                codes = ((keys >> (part * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
                scores = offset + tl.sum(tl.sum(codes * scaled[None, :, :], axis=2), axis=1)
                new_highest = tl.maximum(highest, tl.max(scores, axis=0))
                decay = tl.exp(highest - new_highest)
                weight = tl.exp(scores - new_highest)
                # scale and zero point are those of a token and group: they join its weight, not its numbers
                spot = (at * BLOCK + part * rows + row)[:, None] * GROUPS + group[None, :]
                factor = weight[:, None] * tl.load(value_scale + spot).to(tl.float32)
                zero = tl.sum(weight[:, None] * tl.load(value_zero + spot).to(tl.float32), axis=0)
                numbers = ((values >> (part * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
                summed = summed * decay + tl.sum(numbers * factor[:, :, None], axis=0) + zero[:, None]
                total = total * decay + tl.sum(weight, axis=0)
                highest = new_highest
        to = (head * R + r) * (splits + 1) + split
        tl.store(out + to * D + channel, summed / total)
        tl.store(lse + to, highest + tl.log(total))


@triton.jit(do_not_specialize=["parts"])
def _merge(
    out,  # (N, S + 1, D) fp32
    lse,  # (N, S + 1) fp32
    merged,  # (N, D)
    parts,
    D: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * parts
    channel, highest, total = tl.arange(0, D), -float("inf"), 0.0
    summed = tl.zeros([D], dtype=tl.float32)
    for start in range(0, parts, STEP):
        part = start + tl.arange(0, STEP)
        inside = part < parts
        size = tl.load(lse + row + part, mask=inside, other=-float("inf"))
        new_highest = tl.maximum(highest, tl.max(size, axis=0))
        weight, decay = tl.exp(size - new_highest), tl.exp(highest - new_highest)
        where = (row + part)[:, None] * D + channel[None, :]
        numbers = tl.load(out + where, mask=inside[:, None], other=0.0)
        summed = summed * decay + tl.sum(numbers * weight[:, None], axis=0)
        total = total * decay + tl.sum(weight, axis=0)
        highest = new_highest
    tl.store(merged + tl.program_id(0) * D + channel, (summed / total).to(merged.dtype.element_ty))


def split_table(segments: list[tuple[Segment, Segment, int]]) -> Tensor:
    """What each program reads, (S, 9) int64: six addresses, and the blocks that there is room for, first, and end.

    Args:
        segments: of keys, of values, and the number of blocks in use.
    """
    lines = []
    for keys, values, blocks in segments:
        addresses = [memory.data_ptr() for memory in (*keys, *values) if memory is not None]
        starts = range(0, blocks, SPLIT)
        lines += [[*addresses, keys.codes.shape[1], start, min(start + SPLIT, blocks)] for start in starts]
    return torch.tensor(lines).to(segments[0][0].codes.device, non_blocking=True)


def decode_attention(
    query: Tensor,
    recent: tuple[Tensor, Tensor],
    count: int,
    table: Tensor,
    *,
    bits: int,
    value_groups: int,
    scaling: float,
) -> Tensor:
    """Attention of one token to quantized blocks and to those after them: query (G, R, D) -> (G, R, D).

    Args:
        recent: keys and values (G, BLOCK, D), of which the first `count` tokens, at least one, are there.
        table: from `split_table`.
        bits: of a stored number: 8, 4 or 2.
        value_groups: of channels that share a scale, in each head of a value.
    """
    heads, shared, head_size = query.shape
    parts, device = len(table) + 1, query.device
    out = torch.empty(heads, shared, parts, head_size, dtype=torch.float32, device=device)
    lse = torch.empty(heads, shared, parts, dtype=torch.float32, device=device)
    _attend[(heads, parts)](
        *(query.contiguous(), *recent, table, out, lse, count, parts - 1, scaling),
        R=shared,
        D=head_size,
        GROUPS=value_groups,
        BITS=bits,
        BLOCK=BLOCK,
    )
    merged = torch.empty_like(query)
    _merge[(heads * shared,)](out, lse, merged, parts, D=head_size, STEP=64)
    return merged
