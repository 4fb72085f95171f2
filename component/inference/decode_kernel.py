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

from component.inference.quantized_layer import BLOCK, Segment

SPLIT = 8  # blocks that one program reads, 512 tokens


@triton.jit(do_not_specialize=["blocks", "first", "splits"])
def _attend(
    query,  # (G, R, D) of the segment's dtype
    key_codes,
    key_scale,
    key_zero,
    value_codes,
    value_scale,
    value_zero,
    out,  # (G, R, S, D) fp32
    lse,  # (G, R, S) fp32
    blocks,
    capacity,  # blocks in the segment's memory
    first,  # this segment's first split
    splits,
    scaling,
    R: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    per_byte: tl.constexpr = 8 // BITS
    rows: tl.constexpr = BLOCK // per_byte  # bytes of a block and channel
    channel = tl.arange(0, D)
    row = tl.arange(0, rows)
    group = channel // (D // GROUPS)
    for r in tl.static_range(R):
        q = tl.load(query + (head * R + r) * D + channel).to(tl.float32) * scaling
        highest = -float("inf")
        total = 0.0
        summed = tl.zeros([D], dtype=tl.float32)
        for block in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, blocks)):
            at = head * capacity + block
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
        to = (head * R + r) * splits + first + split
        tl.store(out + to * D + channel, summed / total)
        tl.store(lse + to, highest + tl.log(total))


def attend_to_blocks(
    query: Tensor, segments: list[tuple[Segment, Segment, int]], bits: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of one token to quantized blocks: query (G, R, D) -> (G, R, S, D) and log-sum-exp (G, R, S), fp32.

    Args:
        segments: of keys, of values, and the number of blocks in use.
        bits: of a stored number: 8, 4 or 2.
    """
    heads, shared, head_size = query.shape
    counts = [-(-blocks // SPLIT) for *_, blocks in segments]
    out = torch.empty(heads, shared, sum(counts), head_size, dtype=torch.float32, device=query.device)
    lse = torch.empty(heads, shared, sum(counts), dtype=torch.float32, device=query.device)
    first = 0
    for (keys, values, blocks), count in zip(segments, counts, strict=True):
        _attend[(heads, count)](
            *(query.contiguous(), *keys, *values, out, lse),
            *(blocks, keys.codes.shape[1], first, sum(counts), scaling),
            R=shared,
            D=head_size,
            GROUPS=values.scale.shape[3],
            BITS=bits,
            BLOCK=BLOCK,
            SPLIT=SPLIT,
        )
        first += count
    return out, lse
