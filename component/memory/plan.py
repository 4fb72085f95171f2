"""Which memory plan is the fastest that fits? Arithmetic on the model's config alone: no weights, no GPU.

A plan sets the activation checkpointing level of each decoder layer, offloading, and the tile sizes of the MLP and the
loss. `estimate` counts a plan's memory tensor by tensor at the moments where it can peak: the loss, the backward pass
of one layer's MLP and of its attention, and the optimizer step. It counts time in matrix-product operations and bytes
transferred, only to compare plans. `choose_plan` estimates every plan and takes the fastest that fits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from component.memory.workload import (
    GIB,
    Sizes,
    Workload,
    attention_backward_bytes,
    evaluation_bytes,
    input_share,
    loss_bytes,
    sizes,
    step_bytes,
)

Counts = NDArray[Any]  # of layers, or what depends on them: a number for each of several plans
IDLE_GIB = 0.15  # held by PyTorch's allocator beyond tensors
ENGINE_GIB = 0.3  # DeepSpeed's buckets and copies
TILES = (0, 32768, 16384, 8192, 4096, 2048, 1024)  # tokens per MLP tile; 0: no tiling
FLOAT8 = 0.6  # time of a product in FP8, with that of quantizing its factors, of the time in bf16
CHUNKS = (4096, 1024, 256)  # tokens whose logits exist at the same time


@dataclass(frozen=True)
class MemoryPlan:
    """The memory options of a training run.

    The last `keep_layers` decoder layers are at level `everything` (no activation checkpointing), the
    `keep_attention_layers` before them at `attention` (selective: the MLP is recomputed), and the first ones at
    `nothing` (full: everything is recomputed from the layer's input). The backward pass starts with the last layers,
    so their activations are freed by the time the first layers are recomputed.
    """

    keep_layers: int
    keep_attention_layers: int
    keep_attention_output: bool  # of `nothing` layers, so that attention's kernel runs once
    offload_activations: bool  # of `nothing` layers, to pinned CPU memory
    mlp_tile_tokens: int  # 0: no tiling
    loss_chunk_tokens: int
    fetch_ahead: bool = True  # prefetch offloaded activations while the next layer's backward pass runs

    def counts(self, layers: int) -> tuple[int, int, int]:
        """How many of `layers` layers are at level `nothing`, `attention`, `everything`."""
        everything = min(self.keep_layers, layers)
        attention = min(self.keep_attention_layers, layers - everything)
        return layers - everything - attention, attention, everything

    def levels(self, layers: int) -> list[str]:
        """The level of each of `layers` layers, in order."""
        nothing, attention, everything = self.counts(layers)
        return ["nothing"] * nothing + ["attention"] * attention + ["everything"] * everything

    def describe(self, layers: int) -> str:
        """One line for the summary: layers by level of activation checkpointing, and tile sizes."""
        saved = "inputs and attention outputs" if self.keep_attention_output else "inputs"
        place = "offloaded to CPU memory" if self.offload_activations else "kept on the GPU"
        levels = (f"full ({saved} {place})", "selective (MLP recomputed)", "none")
        parts = [f"{level} in {count}" for count, level in zip(self.counts(layers), levels, strict=True) if count]
        tile = f"MLP in tiles of {self.mlp_tile_tokens} tokens" if self.mlp_tile_tokens else "MLP not tiled"
        checkpointing = f"activation checkpointing {', '.join(parts)} of {layers} layers"
        return f"{checkpointing}; {tile}, loss in chunks of {self.loss_chunk_tokens}"


@dataclass(frozen=True)
class Estimate:
    peak_gib: float  # held by PyTorch's allocator on the GPU
    host_gib: float  # pinned CPU memory for offloaded activations
    cost: float  # relative time of a step, only for comparing plans
    moment: str  # of the peak
    evaluation_gib: float = 0.0  # peak of an evaluation, which no memory option changes but loss_chunk_tokens

    @property
    def metrics(self) -> dict[str, float]:
        return {"estimated_gib": round(max(self.peak_gib, self.evaluation_gib), 2)}


def estimate(work: Workload, plan: MemoryPlan) -> Estimate:
    """Peak GPU memory, pinned CPU memory and cost of one training step of `work` under `plan`."""
    counts = np.array(plan.counts(work.layers))[:, None]
    moments = _moments(work, plan, counts)
    moment = max(moments, key=lambda name: moments[name][0])
    always = _always_gib(work)
    evaluation = always + evaluation_bytes(work, plan.loss_chunk_tokens) / GIB if work.eval_tokens else 0.0
    peak, host, cost = always + moments[moment] / GIB, _host_gib(work, plan, counts), _cost(work, plan, counts)
    return Estimate(float(peak[0]), float(host[0]), float(cost[0]), moment, evaluation)


def _always_gib(work: Workload) -> float:
    return sizes(work).fixed / GIB + IDLE_GIB + (ENGINE_GIB if work.zero else 0)


def _host_gib(work: Workload, plan: MemoryPlan, counts: Counts) -> Counts:
    output = sizes(work).query if plan.keep_attention_output else 0
    return (sizes(work).hidden + output) * counts[0] / GIB * plan.offload_activations


def _moments(work: Workload, plan: MemoryPlan, counts: Counts) -> dict[str, Counts]:
    """Bytes at each moment when memory can peak, for each column of `counts`; -inf where there is no such moment.

    Args:
        counts: (3, plans) layers at level nothing, attention and everything, instead of those of `plan`.
    """
    size, (nothing, attention, everything) = sizes(work), counts
    output = size.query if plan.keep_attention_output else 0
    lse = size.lse * nothing if plan.keep_attention_output else 0
    if plan.offload_activations:  # attention's output of the layer below arrives after the moments that count
        inputs = np.minimum(1 + plan.fetch_ahead, nothing) * size.hidden + np.minimum(1, nothing) * output + lse
        in_transfer = (size.hidden + output) * (nothing > 0) + lse
    else:
        inputs = in_transfer = nothing * (size.hidden + output) + lse
    kept = in_transfer + attention * size.attention + everything * (size.attention + size.gate_and_up)
    chunk = min(plan.loss_chunk_tokens, work.tokens) * work.vocabulary
    loss = kept + 3 * size.hidden + loss_bytes(work, chunk) + size.gathered_head
    moments = {"the loss": loss, "the optimizer's step": np.full(len(loss), step_bytes(work))}
    attention_backward = size.hidden + attention_backward_bytes(work, size)
    # a tile's gate and up are among the tile's own; those of the other tiles wait for their turn
    waiting = kept + size.gathered - _tile_share(work, plan) * size.gate_and_up
    graph = inputs + size.gathered + size.graph - output
    for level, exists, rest in (
        ("everything", everything > 0, waiting),
        ("attention", (everything == 0) & (attention > 0), kept + size.gathered),
        ("nothing", nothing > 0, graph),
    ):
        tile = 2 * size.hidden + _mlp_backward(work, plan, size, is_kept=level == "everything")
        moments[f"the MLP backward at level {level}"] = np.where(exists, rest + tile, -np.inf)
        moments[f"the attention backward at level {level}"] = np.where(exists, rest + attention_backward, -np.inf)
    return moments


def _tile_share(work: Workload, plan: MemoryPlan) -> float:
    return min(1.0, plan.mlp_tile_tokens / work.tokens) if plan.mlp_tile_tokens else 1.0


def _mlp_backward(work: Workload, plan: MemoryPlan, size: Sizes, is_kept: bool) -> float:
    """Bytes of an MLP's backward pass for one tile: gate, up, their product and its gradient, dequantized weights."""
    share = _tile_share(work, plan)
    buffers = 4 if work.fused else 8  # Liger's kernels work in place, eager functions allocate
    # all three weights stay dequantized while they are used more than once
    weights = size.mlp_weights / 3 if is_kept and share == 1 else size.mlp_weights
    quantized = 0.0  # one activation or gradient in FP8
    if work.in_float8:
        # a weight in two layouts, if its forward product is recomputed; 16-bit weights are transposed first
        forward = 0 if is_kept else 1 if work.float8_forward else work.value_bytes if work.in_4bit else 0
        copies = max(1, forward) if share == 1 else 3 + 2 * forward
        if share < 1 and work.in_4bit and not work.float8_forward:
            copies = max(copies, 3 * work.value_bytes)  # of all three in 16 bits, in the forward pass
        weights = work.hidden * work.mlp * (copies + (0 if work.in_4bit else work.value_bytes))
        quantized = size.mlp / work.value_bytes
    return share * (buffers * size.mlp + 2 * size.hidden + size.norm + quantized) + weights


def _cost(work: Workload, plan: MemoryPlan, counts: Counts) -> Counts:
    size, n, backward = sizes(work), work.tokens, FLOAT8 if work.in_float8 else 1.0
    forward = backward if work.float8_forward else 1.0
    per_layer, matrix = forward * work.weights / work.layers, forward * work.hidden * work.mlp
    products, pairs = 2 * n * per_layer, 2 * n * work.group * work.heads * work.head_size * 1.7
    both = products * (1 + backward / forward)
    recomputed = (  # by a layer at level nothing, attention, everything
        products - 2 * n * matrix + (0 if plan.keep_attention_output else pairs),
        4 * n * matrix,
        0.0,
    )
    cost = (counts * (both + 3.5 * pairs + np.array(recomputed)[:, None])).sum(0)
    # small matrix products underuse a GPU: tiles of 2048 tokens cost 4 % of a step on an H200, tiles of 8192 about 1 %
    tile = min(plan.mlp_tile_tokens or n, n)
    cost *= 1 + (80 / tile if tile < n else 0) + 4 / plan.loss_chunk_tokens
    if plan.offload_activations:  # nearly free while the copy takes less time than the layer's computation
        output = size.query if plan.keep_attention_output else 0
        moved = size.hidden + output
        late = 2 * max(0.0, moved * 25e3 - (products + pairs))
        # back, the output has the time in which q, k, v are recomputed, and their gradients in the layer above
        late += max(0.0, output * 25e3 - (products + products * backward / forward) * input_share(work))
        cost += counts[0] * (late + moved * (1e3 if plan.fetch_ahead else 25e3))
    return cost


def choose_plan(
    work: Workload, budget_gib: float = math.inf, host_gib: float = math.inf, **options: Any
) -> tuple[MemoryPlan, Estimate]:
    """The fastest plan within `budget_gib` of GPU memory and `host_gib` of pinned CPU memory; ties: the least memory.

    Args:
        options: memory options that the user has set, by field of `MemoryPlan`; None leaves an option to the plan.

    Returns:
        The plan and its estimate. If no plan fits, the one that needs the least memory.
    """
    groups = list(_candidates(work, options))
    parts = []
    for plan, (keep, attention) in groups:
        everything = np.minimum(keep, work.layers)
        between = np.minimum(attention, work.layers - everything)
        counts = np.stack([work.layers - everything - between, between, everything])
        peak = _always_gib(work) + np.max(list(_moments(work, plan, counts).values()), 0) / GIB
        parts.append(np.stack([_cost(work, plan, counts), peak, _host_gib(work, plan, counts), keep, attention]))
    cost, peak, host, keep, attention = np.concatenate(parts, 1)
    allowed = host <= host_gib if (host <= host_gib).any() else np.full(len(host), True)
    fits = allowed & (peak <= budget_gib)
    order = np.lexsort((peak, cost, ~fits)) if fits.any() else np.lexsort((cost, peak, ~allowed))
    best = int(order[0])
    group = int(np.searchsorted(np.cumsum([part.shape[1] for part in parts]), best, side="right"))
    plan = replace(groups[group][0], keep_layers=int(keep[best]), keep_attention_layers=int(attention[best]))
    return plan, estimate(work, plan)


MEMORY_OPTIONS = {  # the advice when memory runs out, cheapest first: YAML key -> setting and its effect
    "keep_layers": "keep_layers: 0 (activation checkpointing in every layer)",
    "keep_attention_layers": "keep_attention_layers: 0 (full activation checkpointing in every layer)",
    "keep_attention_output": "keep_attention_output: false (attention's kernel runs twice)",
    "offload_activations": "offload_activations: true (layer inputs offloaded to pinned CPU memory)",
    "mlp_tile_tokens": "mlp_tile_tokens: 1024 (smaller MLP tiles)",
    "loss_chunk_tokens": "loss_chunk_tokens: 256 (fewer logits at a time)",
}
MINIMUM_MEMORY: dict[str, Any] = {
    "keep_layers": 0,
    "keep_attention_layers": 0,
    "keep_attention_output": False,
    "offload_activations": True,
    "mlp_tile_tokens": min(TILES[1:]),
    "loss_chunk_tokens": min(CHUNKS),
}


def minimum_memory_plan() -> MemoryPlan:
    """The plan with the least GPU memory, whatever it costs in time."""
    return MemoryPlan(**MINIMUM_MEMORY, fetch_ahead=False)


def next_memory_option(work: Workload, plan: MemoryPlan) -> str:
    """The YAML setting that saves memory at the least cost in time."""
    for name, advice in MEMORY_OPTIONS.items():
        leaner = replace(plan, **{name: MINIMUM_MEMORY[name]})
        if estimate(work, leaner).peak_gib < 0.99 * estimate(work, plan).peak_gib:
            return advice
    if work.in_float8:
        exact = replace(work, in_float8=False)
        if estimate(exact, plan).peak_gib < 0.99 * estimate(work, plan).peak_gib:
            return "frozen_matmul: unquantized (no copies of weights and activations in FP8)"
    if work.zero and not work.offload_optimizer:
        return "deepspeed: ./train_args/deepspeed/deepspeed_config_s2.json (optimizer states in CPU memory)"
    return "a smaller max_seq_length or lora_rank"


def describe_estimate(work: Workload, plan: MemoryPlan, expected: Estimate, budget_gib: float) -> str:
    """One line for the summary: the plan, its expected peak, and what to change if it may not fit."""
    line = plan.describe(work.layers)
    if math.isinf(budget_gib):
        return line
    line += f"; estimated peak {expected.peak_gib:.1f} of {budget_gib:.1f} GiB during {expected.moment}"
    if expected.host_gib:
        line += f", {expected.host_gib:.1f} GiB of pinned CPU memory"
    if expected.peak_gib > budget_gib:
        line += f". It may not fit; to save memory: {next_memory_option(work, plan)}"
    if expected.evaluation_gib > max(budget_gib, expected.peak_gib):
        cure = "per_device_eval_batch_size: 1" if work.eval_rows > 1 else "shorter samples in eval_file"
        line += f". Evaluation may not fit: {expected.evaluation_gib:.1f} GiB; to save memory: {cure}"
    return line


def _candidates(work: Workload, options: dict[str, Any]) -> Iterator[tuple[MemoryPlan, Counts]]:
    """Plans that differ in more than the layers' levels, and (2, plans) numbers of layers to keep under each."""

    def choices(name: str, free) -> list:
        return list(free) if options.get(name) is None else [options[name]]

    kept = np.array(
        [
            (keep, attention)
            for keep in choices("keep_layers", range(work.layers + 1))
            for attention in choices("keep_attention_layers", range(work.layers - min(keep, work.layers) + 1))
        ]
    ).T
    rest = product(
        choices("keep_attention_output", (False, True)),
        choices("offload_activations", (False, True)),
        choices("mlp_tile_tokens", [tile for tile in TILES if tile < work.tokens]),
        choices("loss_chunk_tokens", [c for c in CHUNKS if c <= work.tokens] or [work.tokens]),
        (True, False),
    )
    for output, offload, tile, chunk, ahead in rest:
        if offload or ahead:
            yield MemoryPlan(0, 0, output, offload, tile, chunk, ahead), kept
