"""How long will a training step take, and how much disk do checkpoints? Arithmetic on the workload and its plan.

Seconds are those of rows of full length, and leave out what GPUs send each other. The constants below are fitted to
the recorded steps of LLaMA2-7B and 13B on an H200 (tests/component/memory/test_cost.py) and an H100, and meet those
within 15 %; UNFUSED and LAUNCH rest on one row each, HOST_UPDATE on three.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from component.memory.plan import MemoryPlan, estimate
from component.memory.workload import GIB, Workload, input_share, sizes

LORA = 1 / 5  # share of the matrix rate that products with a thin matrix reach
ATTENTION = 0.69  # the same of attention, where it was not measured by itself
PASSES = 1.8  # each tensor of a layer is read or written this often, outside of products, per pass over the layer
UNFUSED = 3  # as often without Liger's kernels
DEQUANTIZED = 4.0  # passes over a weight to turn it from 4 bits to 16 bits
FIXED = 0.041  # s of an optimizer step on the GPU
HOST_UPDATE = 1.1e-9  # s per parameter of an optimizer step on the CPU: its memory is read and written
LAUNCH = 9e-3  # s in which the CPU launches the kernels of a layer, forward and backward


@dataclass(frozen=True)
class Rate:
    """What a GPU does in a second."""

    matrix: float  # FLOP in products of 16-bit matrices
    attention: float  # FLOP in attention inside groups, forward and backward
    full_attention: float  # the same over whole rows
    bandwidth: float  # bytes read and written in its memory
    link: float  # bytes to or from pinned CPU memory
    float8: float = 0.0  # FLOP in products of FP8 matrices; 0: it has none


class StepFlop(NamedTuple):
    """FLOP of a micro-batch on one GPU, without what LoRA's own thin matrices take in `lora`."""

    products: float
    lora: float
    attention: float
    passes: float  # over all layers: 2, forward and backward, and what is recomputed


def step_flop(work: Workload, plan: MemoryPlan, *, full: bool = False) -> StepFlop:
    """FLOP of a micro-batch under `plan`, of a step with full attention if `full`.

    A product of N tokens and W weights takes 2 N W, and as much in the backward pass, since frozen weights need no
    gradient; LoRA's matrices do. Attention takes 4 D FLOP per pair of query and key in a head of D numbers, and in the
    backward pass 2.5 times as many.
    """
    nothing, attention, _ = plan.counts(work.layers)
    n, layers = work.tokens, work.layers
    products = 2 * n * work.weights / layers
    mlp = 2 * n * work.hidden * work.mlp  # of one of its three matrices; `down` is never recomputed
    recomputed = nothing * (products - mlp) + attention * 2 * mlp
    head = _head_flop(work)
    lora = 2 * n * (work.trained - (work.embeddings if work.head else 0))
    share = recomputed / products / layers
    pairs = 4 * work.heads * work.head_size * _pairs(work, full)
    kernels = 3.5 * layers + (0 if plan.keep_attention_output else nothing)
    return StepFlop(2 * products * layers + recomputed + head, lora * (3 + share), pairs * kernels, 2 + share)


def _head_flop(work: Workload) -> int:
    return 2 * work.tokens * work.hidden * work.vocabulary * (3 if work.head else 2)


def _pairs(work: Workload, full: bool) -> float:
    """(query, key) pairs in one head of a micro-batch, on one GPU; the mean over shifted and unshifted heads."""
    row = work.tokens / work.rows * work.sequence_processes
    group = row if full else min(work.group, row)
    pairs = row * (row + 1) / 2 if group == row else row * (group + 1) / 2 - group**2 / 8
    return work.rows * pairs / work.sequence_processes


def step_seconds(
    work: Workload,
    plan: MemoryPlan,
    rate: Rate,
    *,
    micro_batches: int = 1,
    full: bool = False,
    cuda_graph: bool = False,
) -> float:
    """Seconds of an optimizer step over `micro_batches`; `full`: of one with full attention.

    Args:
        cuda_graph: micro-batches are launched at once.
    """
    flop = step_flop(work, plan, full=full)
    attention_rate = rate.full_attention if full else rate.attention
    tile = min(plan.mlp_tile_tokens or work.tokens, work.tokens)
    tiling = 1 + (80 / tile if tile < work.tokens else 0)  # as in the choice of a plan
    in_float8 = _float8_flop(work, flop)
    products = (flop.products - in_float8 + flop.lora / LORA) / rate.matrix
    products = tiling * (products + (in_float8 / rate.float8 if in_float8 else 0))
    query = work.heads * work.head_size
    values = work.tokens * (10 * work.hidden + 2 * query + 6 * work.mlp) * work.value_bytes
    moved = values * work.layers * PASSES * (1 if work.fused else UNFUSED)
    # the share of passes in which weights and activations become FP8; in the others, weights in 4 bits become 16 bits
    share = work.in_float8 * (1 if work.float8_forward else 1 / flop.passes)
    stored, others = 0.5 if work.in_4bit else work.value_bytes, (1 - share) * work.in_4bit
    moved += work.weights * DEQUANTIZED * (share * (stored + 1) + others * (stored + work.value_bytes))
    kv = work.kv_heads * work.head_size
    quantized = 2.0 * work.hidden + query + 2 * kv + 2 * work.mlp  # gradients; with inputs, the mean of both
    quantized -= (kv + work.mlp / 2) * work.float8_forward
    moved += share * work.tokens * quantized * work.layers * (work.value_bytes + 1)
    busy = products + flop.attention / attention_rate + flop.passes * moved / rate.bandwidth
    busy += _waiting(work, plan, rate, busy / flop.passes)
    update = HOST_UPDATE * work.trained / work.processes if work.offload_optimizer else 0
    launched = 0 if cuda_graph else LAUNCH * work.layers
    return micro_batches * max(busy, launched) + FIXED + update


def _float8_flop(work: Workload, flop: StepFlop) -> float:
    """FLOP of a micro-batch in FP8: of products with the weights of layers, or of those of the backward pass alone."""
    if not work.in_float8:
        return 0.0
    return flop.products - _head_flop(work) if work.float8_forward else 2.0 * work.tokens * work.weights


def _waiting(work: Workload, plan: MemoryPlan, rate: Rate, a_pass: float) -> float:
    """Seconds in which the GPU waits for offloaded activations; `a_pass`: of one pass over the layers."""
    copy = estimate(work, plan).host_gib * GIB / rate.link
    waiting = max(0.0, copy - a_pass) + (max(0.0, copy - a_pass) if plan.fetch_ahead else copy)
    if plan.keep_attention_output and plan.fetch_ahead:  # see `fetching_after_attention`
        size = sizes(work)
        waiting += max(0.0, copy * size.query / (size.hidden + size.query) - 2 * a_pass * input_share(work))
    return waiting


def describe_time(
    work: Workload,
    plan: MemoryPlan,
    rate: Rate,
    *,
    steps: int,
    micro_batches: int,
    is_full: bool,
    full_ratio: float,
    cuda_graph: bool = False,
    done: int = 0,
) -> tuple[str, dict[str, float]]:
    """Seconds of a step and hours of those of `steps` that are not `done`: a line, and its numbers by name.

    Args:
        is_full: full attention in all steps, else S2-Attn but for the last `full_ratio` of them.
        cuda_graph: see `step_seconds`.
    """
    options: dict[str, Any] = {"micro_batches": micro_batches, "cuda_graph": cuda_graph}
    short, long = (step_seconds(work, plan, rate, full=full, **options) for full in (is_full, True))
    left = max(0, steps - done)
    count = 0 if is_full else min(left, full_steps(steps, full_ratio))
    hours = ((left - count) * short + count * long) / 3600
    found = {"seconds_per_step": short} | ({"seconds_per_full_step": long} if count else {}) | {"hours": hours}
    more = f", {long:.3g} s in the last {count} with full attention" if count else ""
    without = ", without what GPUs send each other" if work.processes > 1 else ""
    which = f"{steps} steps" if not done else f"the {left} steps left of {steps},"
    return f"{short:.3g} s per step{more}; {hours:.3g} h for {which} of full rows{without}", found


def full_steps(steps: int, ratio: float) -> int:
    """How many of `steps` train with full attention, of those that begin with S2-Attn."""
    return max(1, round(ratio * steps)) if ratio else 0


def checkpoint_bytes(work: Workload, *, only_model: bool = False) -> float:
    """Disk for a checkpoint: the adapter and, unless `only_model`, the optimizer's states, of all processes."""
    if only_model:
        return work.trained * (work.value_bytes if work.zero else 4)
    name = work.optimizer
    moments = 0 if "sgd" in name else 2 if "8bit" in name else 8
    if work.zero:  # in 16 bits, twice: the adapter and DeepSpeed's own copy; with fp32 master weights
        return work.trained * (work.value_bytes * 2 + 4 + (8 if work.offload_optimizer else moments))
    return work.trained * (4 + moments)
