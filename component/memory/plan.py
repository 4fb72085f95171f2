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

from component.attention.shift_short import HEAD_TOKENS
from component.loss import eval_chunk
from component.memory.workload import GIB, Sizes, Workload, gathered_bytes, input_share, sizes, step_bytes

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
    size, counts = sizes(work), plan.counts(work.layers)
    nothing, attention, everything = counts
    output = size.query if plan.keep_attention_output else 0
    lse = size.lse * nothing if plan.keep_attention_output else 0
    if plan.offload_activations:  # attention's output of the layer below arrives after the moments that count
        inputs = min(1 + plan.fetch_ahead, nothing) * size.hidden + min(1, nothing) * output + lse
    else:
        inputs = nothing * (size.hidden + output) + lse
    in_transfer = (size.hidden + output if nothing else 0) + lse if plan.offload_activations else inputs
    kept = in_transfer + attention * size.attention + everything * (size.attention + size.gate_and_up)
    chunk = min(plan.loss_chunk_tokens, work.tokens) * work.vocabulary
    loss = kept + 3 * size.hidden + _loss_bytes(work, chunk) + size.gathered_head
    moments = {"the loss": loss, "the optimizer's step": step_bytes(work)}
    attention_backward = size.hidden + _attention_backward(work, size)
    if attention + everything:
        level = "everything" if everything else "attention"
        # a tile's gate and up are among the tile's own; those of the other tiles wait for their turn
        rest = kept + size.gathered - (_tile_share(work, plan) * size.gate_and_up if everything else 0)
        tile = _mlp_backward(work, plan, size, is_kept=bool(everything))
        moments[f"the MLP backward at level {level}"] = rest + 2 * size.hidden + tile
        moments[f"the attention backward at level {level}"] = rest + attention_backward
    if nothing:
        graph = inputs + size.gathered + size.graph - output
        tile = _mlp_backward(work, plan, size, is_kept=False)
        moments["the MLP backward at level nothing"] = graph + 2 * size.hidden + tile
        moments["the attention backward at level nothing"] = graph + attention_backward
    moment = max(moments, key=moments.__getitem__)
    always = size.fixed / GIB + IDLE_GIB + (ENGINE_GIB if work.zero else 0)
    host = (size.hidden + output) * nothing if plan.offload_activations else 0
    evaluation = always + _evaluation(work, plan) / GIB if work.eval_tokens else 0.0
    return Estimate(always + moments[moment] / GIB, host / GIB, _cost(work, plan, size, counts), moment, evaluation)


def _loss_bytes(work: Workload, chunk: int) -> float:
    """Logits and their gradients, `chunk` numbers each, and of a trained lm_head its gradient's fp32 sum and one
    chunk's contribution, and its 16-bit copy.
    """
    logits = chunk * (2 * work.value_bytes + 8)
    is_copied = not work.zero and work.value_bytes < 4  # DeepSpeed's own are in 16 bits
    return logits + work.head * (4 + work.value_bytes * (1 + is_copied))


def _evaluation(work: Workload, plan: MemoryPlan) -> float:
    """Bytes of an evaluation batch: Hugging Face's MLP, whose output LoRA's is added to, or one chunk of the loss."""
    n, value = work.eval_tokens, work.value_bytes
    weight = work.hidden * work.mlp * value if work.in_4bit else 0
    layer = 5 * n * work.mlp * value + weight  # act(gate), up, LoRA's part, that scaled, their sum
    chunk = eval_chunk(plan.loss_chunk_tokens, work.eval_rows) * work.eval_rows
    logits = min(chunk, n) * work.vocabulary * (value + 8)  # in both dtypes, and their softmax
    gathered, head = gathered_bytes(work)
    return 2 * n * work.hidden * value + max(layer + gathered, logits + head)


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


def _attention_backward(work: Workload, size: Sizes) -> float:
    """Bytes: gradients of the output and of q, k, v, and one kernel call's own gradients and fp32 accumulators."""
    gradients = size.query + 2 * size.key
    # of the heads in one call: of an odd number of key/value heads, the shifted half has one more
    most = -(-work.kv_heads // 2) / work.kv_heads if work.kv_heads > 1 else 0.5
    share = min(most, max(HEAD_TOKENS / work.tokens / work.heads, 1 / work.kv_heads))
    # a call's keys and values from the left, their gradients, and what is on its way: the next ones, and to and fro
    transfers = 5 * share * size.left
    if size.by_heads:  # copies to be sent, and received
        transfers += 2 * gradients
    kernel = share * (gradients + size.query * 4 / work.value_bytes)
    quantized = max(size.query, size.hidden) / work.value_bytes if work.in_float8 else 0  # a gradient in FP8
    return size.query + gradients + transfers + kernel + quantized


def _cost(work: Workload, plan: MemoryPlan, size: Sizes, counts: tuple[int, int, int]) -> float:
    n, backward = work.tokens, FLOAT8 if work.in_float8 else 1.0
    forward = backward if work.float8_forward else 1.0
    per_layer, matrix = forward * work.weights / work.layers, forward * work.hidden * work.mlp
    products, pairs = 2 * n * per_layer, 2 * n * work.group * work.heads * work.head_size * 1.7
    both = products * (1 + backward / forward)
    recomputed = (  # by a layer at level nothing, attention, everything
        products - 2 * n * matrix + (0 if plan.keep_attention_output else pairs),
        4 * n * matrix,
        0.0,
    )
    cost = sum(count * (both + 3.5 * pairs + more) for count, more in zip(counts, recomputed, strict=True))
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
    plans = [(plan, estimate(work, plan)) for plan in _candidates(work, options)]
    plans = [pair for pair in plans if pair[1].host_gib <= host_gib] or plans
    fitting = [pair for pair in plans if pair[1].peak_gib <= budget_gib]
    if fitting:
        return min(fitting, key=lambda pair: (pair[1].cost, pair[1].peak_gib))
    return min(plans, key=lambda pair: (pair[1].peak_gib, pair[1].cost))


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


def _candidates(work: Workload, options: dict[str, Any]) -> Iterator[MemoryPlan]:
    def choices(name: str, free) -> list:
        return list(free) if options.get(name) is None else [options[name]]

    rest = product(
        choices("keep_attention_output", (False, True)),
        choices("offload_activations", (False, True)),
        choices("mlp_tile_tokens", [tile for tile in TILES if tile < work.tokens]),
        choices("loss_chunk_tokens", [c for c in CHUNKS if c <= work.tokens] or [work.tokens]),
        (True, False),
    )
    for output, offload, tile, chunk, ahead in rest:
        if not (offload or ahead):
            continue
        for keep in choices("keep_layers", range(work.layers + 1)):
            for attention in choices("keep_attention_layers", range(work.layers - min(keep, work.layers) + 1)):
                yield MemoryPlan(keep, attention, output, offload, tile, chunk, ahead)
