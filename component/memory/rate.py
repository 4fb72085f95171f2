"""How fast is a GPU? Measured in a few seconds with the model's own shapes, or from published numbers."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from component.attention.kernel import attention_backward, attention_forward, select_kernel
from component.error import UserError, nearest
from component.float8.product import CAPABILITY, multiply, quantize
from component.memory.cost import ATTENTION, Rate
from component.memory.workload import Workload

TOKENS = 8192  # of the measured product
LONGEST = 32768  # tokens of measured attention
COPY = 2**28  # bytes of the measured copies
WARM_UP = 0.2  # s before each measurement
EFFICIENCY = 0.71  # of the published matrix rate, as an H200 keeps it up; much less on a card that its power limits
FLOAT8 = 1.95  # rate of FP8 products, of that in 16 bits, as measured on an H100
MEMORY, LINK = 0.87, 0.85  # of the published bandwidths


class Card(NamedTuple):
    """Published: dense 16-bit TFLOP/s with fp32 sums, GB/s of GPU memory, GB/s of PCIe in one direction."""

    tflops: float
    memory: float
    pcie: float
    efficiency: float = EFFICIENCY
    has_float8: bool = False


CARDS = {
    "t4": Card(65, 320, 16, 0.4),  # 70 W
    "v100": Card(125, 900, 16),
    "a100": Card(312, 2039, 32),
    "l4": Card(121, 300, 32, 0.4, True),  # 72 W
    "l40s": Card(362, 864, 32, 0.6, True),
    "rtx3090": Card(71, 936, 32),
    "rtx4090": Card(165, 1008, 32, has_float8=True),
    "rtx5090": Card(210, 1792, 64, has_float8=True),
    "h100": Card(989, 3350, 64, has_float8=True),  # SXM
    "h200": Card(989, 4800, 64, has_float8=True),
}


def published_rate(name: str) -> Rate:
    """The rate to expect of a card in `CARDS`; upper case and blanks do not matter.

    Raises:
        UserError: there is no such card.
    """
    known = name.lower().replace(" ", "")
    if known not in CARDS:
        raise UserError(f"--card: {name!r} is none of {', '.join(CARDS)}{nearest(known, CARDS)}")
    card = CARDS[known]
    matrix = card.efficiency * card.tflops * 1e12
    attention, float8 = ATTENTION * matrix, FLOAT8 * matrix if card.has_float8 else 0.0
    return Rate(matrix, attention, attention, MEMORY * card.memory * 1e9, LINK * card.pcie * 1e9, float8)


def measured_rate(work: Workload, device: torch.device, dtype: torch.dtype) -> Rate | None:
    """The rate of this GPU in `dtype`; None where it cannot be known: no GPU, no memory, a product that fails.

    Random numbers drawn later are the same as without it.
    """
    if device.type != "cuda" or dtype.itemsize != 2:
        return None
    try:
        matrix = matrix_rate(TOKENS, work.hidden, work.mlp, device, dtype)
        has_float8 = work.in_float8 and torch.cuda.get_device_capability(device) >= CAPABILITY
        float8 = float8_rate(TOKENS, work.hidden, work.mlp, device) if has_float8 else 0.0
        row = work.tokens // work.rows
        attention = _attention_rate(work, min(work.group, row), device, dtype) or ATTENTION * matrix
        full = attention
        if work.full_steps and work.group < row:
            full = _attention_rate(work, row, device, dtype) or ATTENTION * matrix
        source = torch.empty(COPY, dtype=torch.uint8, device=device)
        bandwidth = 2 * COPY / gpu_seconds(lambda: source.clone())
        host = torch.empty(COPY, dtype=torch.uint8, pin_memory=True)
        link = COPY / gpu_seconds(lambda: host.copy_(source, non_blocking=True), runs=5)
        return Rate(matrix, attention, full, bandwidth, link, float8)
    except RuntimeError:  # out of memory too; an estimate is no reason not to train
        return None
    finally:
        torch.cuda.empty_cache()


def gpu_seconds(run: Callable[[], object], runs: int = 20) -> float:
    """Median seconds of `run` on the GPU, whose clocks are up.

    All runs are queued at once: a GPU that waits for a busy CPU between kernels would seem slow.
    """
    start = time.monotonic()
    while time.monotonic() - start < WARM_UP:
        run()
        torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(second) for first, second in itertools.pairwise(events)) / 1e3


def matrix_rate(tokens: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the product of a (tokens, inputs) and an (inputs, outputs) matrix."""
    left, right = _random((tokens, inputs), device, dtype), _random((inputs, outputs), device, dtype)
    return 2 * tokens * inputs * outputs / gpu_seconds(lambda: left @ right)


def float8_rate(tokens: int, inputs: int, outputs: int, device: torch.device) -> float:
    """The same in FP8, of matrices that are quantized already."""
    shapes = (tokens, inputs), (outputs, inputs)
    left, right = (quantize(_random(shape, device, torch.bfloat16)) for shape in shapes)
    return 2 * tokens * inputs * outputs / gpu_seconds(lambda: multiply(left, right, torch.bfloat16))


def _attention_rate(work: Workload, tokens: int, device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of causal attention over `tokens` tokens, forward and backward; None without a fused kernel.

    As many groups and heads at once as in training, which fill the GPU, but at most 32768 tokens in all: beyond, the
    rate hardly changes, and a small card would take long.
    """
    tokens, per_kv = min(tokens, LONGEST), work.heads // work.kv_heads
    groups = max(1, min(work.tokens, LONGEST) // tokens)
    kv_heads = max(1, min(work.kv_heads // 2, 4 * LONGEST // (groups * tokens) // per_kv))
    shapes = [(groups, heads, tokens, work.head_size) for heads in (kv_heads * per_kv, kv_heads, kv_heads)]
    query, key, value = (_random(shape, device, dtype) for shape in shapes)
    kernel = select_kernel(query, key, value)
    if kernel is None:
        return None

    def run() -> None:
        out, saved = attention_forward(query, key, value, kernel=kernel)
        attention_backward(query, query, key, value, out, saved, None)

    flop = 3.5 * 4 * groups * query.shape[1] * work.head_size * tokens * (tokens + 1) / 2
    return flop / gpu_seconds(run, runs=4)


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Normally distributed: zeros would take less power. From its own generator, to leave the run's alone."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)
