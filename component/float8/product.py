"""How is a product with a frozen weight computed in FP8? Both factors are quantized by row, sums are in fp32.

The rows of both factors run along the sum of the product. Each has a scale of its own: its largest absolute value
/ 448, which is the largest number of e4m3. So a token's result depends on no other token: tiles, chunks, padding and
the processes that share a row change nothing. GPUs of compute capability 8.9 and newer (Ada, Hopper, Blackwell)
multiply FP8 twice as fast as bf16; elsewhere the same numbers are multiplied in fp32, slowly, to try what FP8 costs in
quality.

Frozen weights are scaled to less than 448, by another factor in each optimizer step, so that their errors change from
step to step (`round_weights_for_step`).

Shapes: M rows, K numbers in each; O, I the outputs and inputs of a linear layer.
"""

import copy
import functools
import importlib.util
from typing import ClassVar, NamedTuple

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CAPABILITY = (8, 9)  # of the first GPUs that multiply FP8
MULTIPLE = 16  # torch._scaled_mm takes weights whose sides are multiples of it
# hidden size: at 4096, 11 to 13 % faster than bf16; at 2048, steps of 4096 tokens, bound by launches, took 10 % longer
# beside other runs; between, by arithmetic
FAST_FROM = 3072
_SCALES = WeakTensorKeyDictionary()  # scales of NF4's blocks -> scales of the weight's rows and columns
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly
TINY = 1e-30  # the smallest absolute value that gets a scale of its own: rows of zeros have one too


class Float8Matrix(NamedTuple):
    """A matrix (M, K) with a scale for each row. Rows are added up to a multiple of 16, all zeros."""

    values: Tensor  # (M rounded up, K), row-major
    scales: Tensor  # (M rounded up, 1) fp32; the matrix is values * scales
    rows: int  # M

    def dequantized(self) -> Tensor:
        """(M, K) in fp32."""
        return (self.values.float() * self.scales)[: self.rows]


@functools.cache
def is_fast(hidden: int, device: torch.device) -> bool:
    """Whether products in FP8 take less time on `device`, for a model of `hidden` size.

    They are tried: what PyTorch and Triton support on a GPU depends on their versions.

    Raises:
        OutOfMemoryError: the GPU has no room for a few kilobytes.
    """
    if hidden < FAST_FROM or device.type != "cuda" or not _multiplies_float8(device) or not _has_triton():
        return False
    try:
        _multiplies(device)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # Triton raises its own, and those of the compilers that it calls
        return False
    return True


def _multiplies(device: torch.device) -> None:
    x = quantize(torch.ones(MULTIPLE, MULTIPLE, dtype=torch.bfloat16, device=device))
    multiply(x, x, torch.bfloat16)


def fits(layer: nn.Linear) -> bool:
    """Whether the products of `layer` can be computed in FP8; else they stay in the training precision."""
    return layer.in_features % MULTIPLE == 0 == layer.out_features % MULTIPLE


class _Rounding:
    limit = torch.finfo(E4M3).max  # what the largest number of a row of a frozen weight becomes
    # the same, by device: CUDA graphs replay Python's numbers as they were, but read tensors
    on_device: ClassVar[dict[torch.device, Tensor]] = {}


def round_weights_for_step(step: int) -> None:
    """Round frozen weights in another way than in the steps before: scaled to between 224 and 448.

    A weight's error depends on where it lies between two numbers of FP8. With the same scales in every step, LoRA
    would learn to make up for errors that the merged model does not have. Not in the papers; what it changes is in
    train_args/README.md.

    Args:
        step: optimizer steps done so far; the same in all processes. 0: scaled to 448.
    """
    _Rounding.limit = torch.finfo(E4M3).max * 2.0 ** -(step * GOLDEN % 1)
    for limit in _Rounding.on_device.values():
        limit.fill_(_Rounding.limit)


def _limit_on(device: torch.device) -> Tensor:
    if device not in _Rounding.on_device:
        _Rounding.on_device[device] = torch.tensor(_Rounding.limit, device=device)
    return _Rounding.on_device[device]


def quantize_frozen(x: Tensor) -> Float8Matrix:
    """`quantize`, with the scales of a frozen weight in this step."""
    return quantize(x, limit=_limit_on(x.device))


def quantize(x: Tensor, dtype: torch.dtype = E4M3, limit: float | Tensor | None = None) -> Float8Matrix:
    """(M, K) with a scale for each row, rounded to the nearest number of `dtype`, ties to even.

    Args:
        limit: what the largest number of a row becomes; None: the largest of `dtype`.
    """
    limit = torch.finfo(dtype).max if limit is None else limit
    if _runs_kernels(x):
        from component.float8.kernel import quantize_rows

        values = x.new_empty(len(x) + -len(x) % MULTIPLE, x.shape[1], dtype=dtype)
        return Float8Matrix(values, quantize_rows(x, values, limit, TINY), len(x))
    return _rounded(x.float(), *scale_of(x.abs().amax(1, keepdim=True).float(), limit), dtype)


def quantize_weight(weight: Tensor, *, transposed: bool) -> Float8Matrix:
    """A weight (O, I), in NF4 or not: for x W^T, with a scale for each output, or as (I, O), for dL/dy W.

    A scale per input needs no look at the weights of NF4, since a block's largest absolute value is stored with it:
    64 neighbouring inputs share the scale of the largest of them. In floating point that costs no precision but in
    weights 2^15 times smaller.
    """
    if not isinstance(weight, bnb.nn.Params4bit):
        return quantize_frozen(weight.detach().t() if transposed else weight.detach())
    state = weight.quant_state
    outputs, inputs = state.shape
    if inputs % state.blocksize:  # blocks that span rows
        full = _dequantized(weight)
        return quantize_frozen(full.t() if transposed else full)
    inverse, scales = _weight_scales(state, transposed)
    if not _runs_kernels(weight):
        full = _dequantized(weight)
        return _rounded(full.t() if transposed else full, inverse, scales, E4M3)
    from component.float8.kernel import nf4_to_float8

    values = torch.empty((inputs, outputs) if transposed else (outputs, inputs), dtype=E4M3, device=weight.device)
    nf4_to_float8(weight.data, inverse, state, values, transposed)
    return Float8Matrix(values, scales, len(values))


def multiply(
    left: Float8Matrix, right: Float8Matrix, dtype: torch.dtype, bias: Tensor | None = None, *, fast: bool = True
) -> Tensor:
    """left right^T (+ bias): (M, K), (N, K) -> (M, N) in `dtype`.

    Args:
        fast: on Hopper, sum in the tensor cores alone, with fewer bits than fp32 has. That errs by some thousandths,
            an order of magnitude less than rounding to FP8 does.
    """
    if not _has_float8(left.values):
        with torch.autocast(left.values.device.type, enabled=False):
            y = left.values.float() @ right.values.float().t() * left.scales * right.scales.t()
        y = y if bias is None else y + bias.float()
        return y[: left.rows, : right.rows].to(dtype)
    y = torch._scaled_mm(
        left.values,
        right.values.t(),
        scale_a=left.scales,
        scale_b=right.scales.t(),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,  # the only one that all versions can write here
        use_fast_accum=fast,
    )
    return y[: left.rows, : right.rows].to(dtype)


def scale_of(largest: Tensor, limit: float | Tensor) -> tuple[Tensor, Tensor]:
    """What rows are multiplied by before they are rounded, and their scales.

    Args:
        largest: absolute value of each row, which becomes `limit`.
    """
    largest = largest.clamp(min=TINY)
    return limit / largest, largest * (1 / limit)


def _rounded(x: Tensor, inverse: Tensor, scales: Tensor, dtype: torch.dtype) -> Float8Matrix:
    """`x` (M, K) in fp32, by plain operations; `inverse` and `scales` (M, 1) as from `scale_of`."""
    more = (0, 0, 0, -len(x) % MULTIPLE)
    values = nn.functional.pad((x * inverse).contiguous(), more).to(dtype)
    return Float8Matrix(values, nn.functional.pad(scales, more), len(x))


def _weight_scales(state: bnb.functional.QuantState, transposed: bool) -> tuple[Tensor, Tensor]:
    """As from `scale_of`, (O, 1), of the rows of a weight, or (I, 1), of upper bounds of its columns' largest values.

    The largest values are computed once, since frozen weights do not change, and the scales once a step: together less
    than 1 % of the weights' memory.
    """
    known, limit = _SCALES.setdefault(state.absmax, {}), _Rounding.limit
    on_device = _limit_on(state.absmax.device)
    if transposed not in known:
        sizes = state.absmax
        if state.nested:  # double quantization
            sizes = bnb.functional.dequantize_blockwise(sizes, state.state2).float() + state.offset
        blocks = sizes.abs().view(state.shape[0], -1)
        largest = blocks.amax(0).repeat_interleave(state.blocksize) if transposed else blocks.amax(1)
        known[transposed] = largest[:, None], None, None
    largest, of, scales = known[transposed]
    if _is_recorded(largest):  # into the graph, which computes them in each replay
        return scale_of(largest, on_device)
    if of != limit:
        scales = scale_of(largest, on_device)
        known[transposed] = largest, limit, scales
    return scales


def _dequantized(weight: bnb.nn.Params4bit) -> Tensor:
    """(O, I) in fp32: rounded to bf16 first, one in thirty would be another number of FP8."""
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(weight.data, state)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_recorded(x: Tensor) -> bool:
    """Whether operations on `x` become part of a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _has_float8(x: Tensor) -> bool:
    """Whether the device of `x` multiplies FP8."""
    return x.is_cuda and _multiplies_float8(x.device)


@functools.cache  # asked 1200 times in a step
def _multiplies_float8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def _runs_kernels(x: Tensor) -> bool:
    return _has_float8(x) and _has_triton()
