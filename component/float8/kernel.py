"""How do activations and NF4 weights become FP8, each in one pass over them? Triton kernels.

The same numbers as the plain operations of component/float8/product.py. Importing this module needs Triton, which
comes with PyTorch for CUDA.

Shapes: M rows, K numbers in each; O, I the outputs and inputs of a linear layer.
"""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState
from torch import Tensor

WHOLE = 16384  # numbers of a row that one program holds; longer rows are read twice
ROWS, COLUMNS = 64, 128  # of a weight, in one program


@triton.jit
def _quantize_rows(
    x,  # (M, K)
    out,  # (M rounded up, K) FP8
    scales,  # (M rounded up) fp32
    rows,
    columns,
    stride,
    limit,  # largest number of `out`, or where it is
    tiny,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_READ: tl.constexpr,
):
    top = tl.load(limit) if IS_READ else limit
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    source, target = x + row * stride, out + row * columns
    end = tl.where(row < rows, columns, 0)
    if IS_WHOLE:
        inside = column < columns
        number = tl.load(source + column, mask=column < end, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(number), axis=0), tiny)
        tl.store(target + column, (number * (top / largest)).to(out.dtype.element_ty), mask=inside)
    else:
        highest = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, columns, BLOCK):
            number = tl.load(source + start + column, mask=start + column < end, other=0.0).to(tl.float32)
            highest = tl.maximum(highest, tl.abs(number))
        largest = tl.maximum(tl.max(highest, axis=0), tiny)
        for start in range(0, columns, BLOCK):
            inside = start + column < columns
            number = tl.load(source + start + column, mask=start + column < end, other=0.0).to(tl.float32)
            tl.store(target + start + column, (number * (top / largest)).to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, largest * (1 / top))


def quantize_rows(x: Tensor, out: Tensor, limit: float | Tensor, tiny: float) -> Tensor:
    """Write (M, K), each row scaled to at most `limit`, to `out` (at least M, K); rows beyond M are zeros.

    Args:
        out: in FP8; rounding is left out if it is in fp32.
        limit: a number, or a tensor of one, which a CUDA graph reads in each replay.
        tiny: the smallest absolute value that is scaled to `limit`.

    Returns:
        The rows' scales (rows of `out`, 1), fp32.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = out.shape
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    is_whole = columns <= WHOLE
    block = triton.next_power_of_2(columns) if is_whole else WHOLE // 2
    _quantize_rows[(rows,)](
        *(x, out, scales, len(x), columns, x.stride(0), limit, tiny),
        BLOCK=block,
        IS_WHOLE=is_whole,
        IS_READ=isinstance(limit, Tensor),
        num_warps=max(1, min(16, block // 512)),
    )
    return scales


@triton.jit
def _nf4_to_float8(
    packed,  # (O, I / 2) uint8: the first of two numbers in the upper bits
    largest,  # (O, I / BLOCK): the largest absolute value of each block, fp32; if NESTED, uint8
    nested_code,  # (256) fp32, for NESTED: of these 8 bits
    nested_largest,  # fp32, of each NESTED blocks' largest values
    offset,  # fp32, added to them
    inverse,  # (O), or (I) if TRANSPOSED, fp32
    code,  # (16) fp32
    out,  # (O, I), or (I, O) if TRANSPOSED, FP8
    outputs,
    inputs,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    byte = first // 2 + tl.arange(0, COLUMNS // 2)
    inside = (row < outputs)[:, None] & (byte < inputs // 2)[None, :]
    pair = tl.load(packed + row[:, None] * (inputs // 2) + byte[None, :], mask=inside, other=0).to(tl.int32)
    # both numbers of a byte are in the same block
    block = row[:, None] * (inputs // BLOCK) + (byte * 2 // BLOCK)[None, :]
    size = tl.load(largest + block, mask=inside, other=0)
    if NESTED:
        scale = tl.load(nested_largest + block // NESTED, mask=inside, other=0.0)
        size = tl.load(nested_code + size.to(tl.int32)) * scale + tl.load(offset)
    number = tl.interleave(tl.load(code + (pair >> 4)) * size, tl.load(code + (pair & 15)) * size)
    column = first + tl.arange(0, COLUMNS)
    if TRANSPOSED:
        factor = tl.load(inverse + column, mask=column < inputs, other=0.0)
        value = tl.trans(number * factor[None, :])
        inside = (column < inputs)[:, None] & (row < outputs)[None, :]
        tl.store(out + column[:, None].to(tl.int64) * outputs + row[None, :], value.to(out.dtype.element_ty), inside)
    else:
        factor = tl.load(inverse + row, mask=row < outputs, other=0.0)
        value = number * factor[:, None]
        inside = (row < outputs)[:, None] & (column < inputs)[None, :]
        tl.store(out + row[:, None] * inputs + column[None, :], value.to(out.dtype.element_ty), inside)


def nf4_to_float8(packed: Tensor, inverse: Tensor, state: QuantState, out: Tensor, transposed: bool) -> None:
    """Write a weight to `out` (O, I), or (I, O) if `transposed`, in FP8; rounding is left out if it is in fp32.

    Args:
        packed: as bitsandbytes stores it, in any dtype; I is a multiple of the block.
        inverse: what each row of the result is multiplied by before it is rounded.
    """
    outputs, inputs = state.shape
    inner = state.state2 if state.nested else state  # without double quantization, none of it is read
    nested = (inner.code, inner.absmax, state.offset if state.nested else inner.absmax)
    _nf4_to_float8[(triton.cdiv(outputs, ROWS), triton.cdiv(inputs, COLUMNS))](
        *(packed.view(torch.uint8), state.absmax, *nested, inverse, state.code, out, outputs, inputs),
        BLOCK=state.blocksize,
        NESTED=inner.blocksize if state.nested else 0,
        TRANSPOSED=transposed,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
