"""How does one new token attend to quantized blocks without dequantizing them to memory? A Triton kernel.

Each program reads some blocks of one key/value head, as they are stored, and writes their attention and log-sum-exp
(split-K decoding, as in Flash-Decoding, https://pytorch.org/blog/flash-decoding). The numbers of a block are used as
they are: with key = zero + scale code, q key = q zero + (q scale) code, and likewise for values. Importing this module
needs Triton, which comes with PyTorch for CUDA.

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


@triton.jit(do_not_specialize=["splits"])
def _attend(
    query,  # (G, R, D) of the scales' dtype
    table,  # (S, 9) int64, see split_table
    out,  # (G, R, S, D) fp32
    lse,  # (G, R, S) fp32
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
    channel = tl.arange(0, D)
    row = tl.arange(0, rows)
    group = channel // (D // GROUPS)
    for r in tl.static_range(R):
        q = tl.load(query + (head * R + r) * D + channel).to(tl.float32) * scaling
        highest = -float("inf")
        total = 0.0
        summed = tl.zeros([D], dtype=tl.float32)
        for at in range(begin, end):
            scale = tl.load(key_scale + at * D + channel).to(tl.float32)
            zero = tl.load(key_zero + at * D + channel).to(tl.float32)
            scaled = q * scale
            offset = tl.sum(q * zero, axis=0)
            where = at * rows * D + row[:, None] * D + channel[None, :]
            keys = tl.load(key_codes + where)
            values = tl.load(value_codes + where)
            for part in tl.static_range(per_byte):
                codes = ((keys >> (part * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
                scores = offset + tl.sum(codes * scaled[None, :], axis=1)
                new_highest = tl.maximum(highest, tl.max(scores, axis=0))
                decay = tl.exp(highest - new_highest)
                weight = tl.exp(scores - new_highest)
                spot = (at * BLOCK + part * rows + row[:, None]) * GROUPS + group[None, :]
                numbers = ((values >> (part * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
                numbers = numbers * tl.load(value_scale + spot).to(tl.float32)
                numbers += tl.load(value_zero + spot).to(tl.float32)
                summed = summed * decay + tl.sum(weight[:, None] * numbers, axis=0)
                total = total * decay + tl.sum(weight, axis=0)
                highest = new_highest
        to = (head * R + r) * splits + split
        tl.store(out + to * D + channel, summed / total)
        tl.store(lse + to, highest + tl.log(total))


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


def attend_to_blocks(
    query: Tensor, table: Tensor, bits: int, value_groups: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of one token to quantized blocks: query (G, R, D) -> (G, R, S, D) and log-sum-exp (G, R, S), fp32.

    Args:
        table: from `split_table`.
        bits: of a stored number: 8, 4 or 2.
        value_groups: of channels that share a scale, in each head of a value.
    """
    heads, shared, head_size = query.shape
    out = torch.empty(heads, shared, len(table), head_size, dtype=torch.float32, device=query.device)
    lse = torch.empty(heads, shared, len(table), dtype=torch.float32, device=query.device)
    _attend[(heads, len(table))](
        *(query.contiguous(), table, out, lse, len(table), scaling),
        R=shared,
        D=head_size,
        GROUPS=value_groups,
        BITS=bits,
        BLOCK=BLOCK,
    )
    return out, lse
