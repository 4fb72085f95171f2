"""Which memory plan fits, and is the fastest that does? Arithmetic on the config alone: no weights, no GPU.

Memory is counted tensor by tensor at the three moments where it can peak: while the loss is computed, while a layer's
MLP goes backward, and while its attention does. Time is counted in products and in bytes to the host, only to compare
plans with each other.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from component.attention.shift_short import HEAD_TOKENS
from component.memory.workload import GIB, Sizes, Workload, sizes, step_bytes

IDLE_GIB, ENGINE_GIB = 0.15, 0.3  # what PyTorch's allocator holds beside tensors; DeepSpeed's buckets and copies
TILES = (0, 32768, 16384, 8192, 4096, 2048, 1024)  # tokens per MLP tile; 0: all at once
CHUNKS = (4096, 1024, 256)  # tokens whose logits exist at a time


@dataclass(frozen=True)
class MemoryPlan:
    """What each decoder layer keeps for its backward pass, and in which portions the rest is computed.

    The first layers keep nothing, the last `keep_layers` everything, those between their attention: the backward pass
    starts with the last, so that what they keep is gone when the first are computed again.
    """

    keep_layers: int
    keep_attention_layers: int
    keep_attention_output: bool
    offload_activations: bool
    mlp_tile_tokens: int  # 0: no tiles
    loss_chunk_tokens: int
    fetch_ahead: bool = True  # what a layer needs comes from the host while the one above it computes

    def counts(self, layers: int) -> tuple[int, int, int]:
        """How many of `layers` layers keep nothing, attention, everything."""
        everything = min(self.keep_layers, layers)
        attention = min(self.keep_attention_layers, layers - everything)
        return layers - everything - attention, attention, everything

    def levels(self, layers: int) -> list[str]:
        """Of each of `layers` layers, in order."""
        nothing, attention, everything = self.counts(layers)
        return ["nothing"] * nothing + ["attention"] * attention + ["everything"] * everything

    def describe(self, layers: int) -> str:
        """One line for people: what the layers keep, and the portions."""
        counts = dict(zip(("nothing", "attention", "everything"), self.counts(layers), strict=True))
        place = "on the host" if self.offload_activations else "on the GPU"
        inputs = "inputs and attention's outputs" if self.keep_attention_output else "inputs"
        parts = {
            "nothing": f"computed again from their {inputs} {place}",
            "attention": "with the MLP computed again",
            "everything": "kept whole",
        }
        lines = [f"{count} layers {parts[level]}" for level, count in counts.items() if count]
        tile = f"MLP in tiles of {self.mlp_tile_tokens} tokens" if self.mlp_tile_tokens else "MLP in one piece"
        return f"{', '.join(lines)}; {tile}, logits of {self.loss_chunk_tokens}"


@dataclass(frozen=True)
class Estimate:
    peak_gib: float  # that PyTorch's allocator must hold on the GPU
    host_gib: float  # pinned for activations
    cost: float  # of a step's products and transfers, in units of no meaning but to compare plans
    moment: str  # when the peak comes

    @property
    def metrics(self) -> dict[str, float]:
        return {"estimated_gib": round(self.peak_gib, 2)}


def estimate(work: Workload, plan: MemoryPlan) -> Estimate:
    """Peak memory, host memory and cost of one step of `work` under `plan`."""
    size, counts = sizes(work), plan.counts(work.layers)
    nothing, attention, everything = counts
    output = size.query if plan.keep_attention_output else 0
    log_sums = size.log_sum * nothing if plan.keep_attention_output else 0
    on_gpu = min(1 + plan.fetch_ahead, nothing) if plan.offload_activations else nothing
    inputs = on_gpu * (size.hidden + output) + log_sums
    leaving = (size.hidden + output if nothing else 0) + log_sums if plan.offload_activations else inputs
    kept = leaving + attention * size.attention + everything * (size.attention + size.gate_and_up)
    chunk = min(plan.loss_chunk_tokens, work.tokens) * work.vocabulary * (2 * work.value_bytes + 8)
    head = work.head * (4 + work.value_bytes)  # its gradient, and a chunk's share of that
    moments = {"the loss": kept + 3 * size.hidden + chunk + head, "the optimizer's step": step_bytes(work)}
    if attention + everything:
        level = "everything" if everything else "attention"
        rest = kept - (size.gate_and_up if everything else 0)
        tile = _tile(work, plan, size, is_kept=bool(everything))
        moments[f"the MLP of a layer that keeps {level}"] = rest + 2 * size.hidden + tile
        moments[f"attention of a layer that keeps {level}"] = rest + size.hidden + _attention_backward(work, size)
    if nothing:
        graph = inputs + size.graph - output
        moments["the MLP of a layer that keeps nothing"] = (
            graph + 2 * size.hidden + _tile(work, plan, size, is_kept=False)
        )
        moments["attention of a layer that keeps nothing"] = graph + size.hidden + _attention_backward(work, size)
    moment = max(moments, key=moments.__getitem__)
    peak = (size.fixed + moments[moment]) / GIB + IDLE_GIB + (ENGINE_GIB if work.zero else 0)
    host = (size.hidden + output) * nothing if plan.offload_activations else 0
    return Estimate(peak, host / GIB, _cost(work, plan, size, counts), moment)


def _tile(work: Workload, plan: MemoryPlan, size: Sizes, is_kept: bool) -> float:
    """What an MLP going backward needs: gate, up, their product and its gradient, for a tile of tokens."""
    share = min(1.0, plan.mlp_tile_tokens / work.tokens) if plan.mlp_tile_tokens else 1.0
    buffers = 4 if work.fused else 8  # eager functions write new tensors where Liger's overwrite
    weights = size.mlp_weights / 3 if is_kept and share == 1 else size.mlp_weights  # held while used more than once
    return share * (buffers * size.mlp + 2 * size.hidden + size.norm) + weights


def _attention_backward(work: Workload, size: Sizes) -> float:
    """Gradients of the output and of q, k, v; those of one kernel call once more, and its own sums in fp32."""
    gradients = size.query + 2 * size.key
    share = min(0.5, max(HEAD_TOKENS / work.tokens / work.heads, 1 / work.kv_heads))
    return size.query + gradients + share * (gradients + size.query * 4 / work.value_bytes)


def _cost(work: Workload, plan: MemoryPlan, size: Sizes, counts: tuple[int, int, int]) -> float:
    n, per_layer = work.tokens, work.weights / work.layers
    matrix = work.hidden * work.mlp
    products, pairs = 2 * n * per_layer, 2 * n * work.group * work.heads * work.head_size * 1.7
    again = (  # of a layer that keeps nothing, attention, everything
        products - 2 * n * matrix + (0 if plan.keep_attention_output else pairs),
        4 * n * matrix,
        0.0,
    )
    # small products leave a GPU idle: tiles of 2048 tokens cost 4 % of a step on an H200, 8192 hardly 1 %
    tile = min(plan.mlp_tile_tokens or n, n)
    cost = sum(count * (2 * products + 3.5 * pairs + more) for count, more in zip(counts, again, strict=True))
    cost *= 1 + (80 / tile if tile < n else 0) + 4 / plan.loss_chunk_tokens
    if plan.offload_activations:  # copies cost nothing beside a layer that computes for longer; a little all the same
        moved = size.hidden + (size.query if plan.keep_attention_output else 0)
        late = max(0.0, moved * 25e3 - (products + pairs))
        cost += counts[0] * (2 * late + moved * (1e3 if plan.fetch_ahead else 25e3))
    return cost


def choose_plan(
    work: Workload, budget_gib: float = math.inf, host_gib: float = math.inf, **by_hand: Any
) -> tuple[MemoryPlan, Estimate]:
    """The fastest plan within `budget_gib` of the GPU and `host_gib` of the host; of those equally fast the leanest.

    Args:
        by_hand: levers that the user has set, by the names of `MemoryPlan`; those that are None are chosen.

    Returns:
        The plan and its estimate; where nothing fits, the leanest plan there is.
    """
    plans = [(plan, estimate(work, plan)) for plan in _candidates(work, by_hand)]
    plans = [pair for pair in plans if pair[1].host_gib <= host_gib] or plans
    fitting = [pair for pair in plans if pair[1].peak_gib <= budget_gib]
    if fitting:
        return min(fitting, key=lambda pair: (pair[1].cost, pair[1].peak_gib))
    return min(plans, key=lambda pair: (pair[1].peak_gib, pair[1].cost))


MEMORY_OPTIONS = {  # what to change in a YAML when memory does not suffice, the cheapest first: (from, to, words)
    "keep_layers": "keep_layers: 0 (every layer is computed again)",
    "keep_attention_layers": "keep_attention_layers: 0 (every layer is computed again)",
    "keep_attention_output": "keep_attention_output: false (attention's kernel runs twice)",
    "offload_activations": "offload_activations: true (layers' inputs wait in host memory)",
    "mlp_tile_tokens": "mlp_tile_tokens: 2048 (the MLP in smaller tiles)",
    "loss_chunk_tokens": "loss_chunk_tokens: 256 (fewer logits at a time)",
}
MINIMUM_MEMORY: dict[str, Any] = {
    "keep_layers": 0,
    "keep_attention_layers": 0,
    "keep_attention_output": False,
    "offload_activations": True,
    "mlp_tile_tokens": 2048,
    "loss_chunk_tokens": 256,
}


def minimum_memory_plan() -> MemoryPlan:
    """The plan of least memory, whatever it costs."""
    return MemoryPlan(**MINIMUM_MEMORY, fetch_ahead=False)


def next_memory_option(work: Workload, plan: MemoryPlan) -> str:
    """The setting of a YAML that saves memory next, at the least cost."""
    for name, words in MEMORY_OPTIONS.items():
        leaner = replace(plan, **{name: MINIMUM_MEMORY[name]})
        if estimate(work, leaner).peak_gib < 0.99 * estimate(work, plan).peak_gib:
            return words
    if work.zero and not work.offload_optimizer:
        return "deepspeed: ./train_args/deepspeed/deepspeed_config_s2.json (optimizer states in host memory)"
    return "a smaller max_seq_length or lora_rank"


def describe_estimate(work: Workload, plan: MemoryPlan, expected: Estimate, budget_gib: float) -> str:
    """One line for the summary of a run."""
    line = plan.describe(work.layers)
    if math.isinf(budget_gib):
        return line
    line += f"; about {expected.peak_gib:.1f} of {budget_gib:.1f} GiB at {expected.moment}"
    if expected.host_gib:
        line += f", {expected.host_gib:.1f} GiB of the host pinned"
    if expected.peak_gib > budget_gib:
        line += f". It will hardly fit; next: {next_memory_option(work, plan)}"
    return line


def _candidates(work: Workload, by_hand: dict[str, Any]) -> Iterator[MemoryPlan]:
    def choices(name: str, free) -> list:
        return list(free) if by_hand.get(name) is None else [by_hand[name]]

    tiles = [tile for tile in TILES if tile < work.tokens]
    rest = product(
        choices("keep_attention_output", (False, True)),
        choices("offload_activations", (False, True)),
        choices("mlp_tile_tokens", tiles),
        choices("loss_chunk_tokens", [c for c in CHUNKS if c <= work.tokens] or [work.tokens]),
        (True, False),
    )
    for output, offload, tile, chunk, ahead in rest:
        if not (offload or ahead):
            continue
        for keep in choices("keep_layers", range(work.layers + 1)):
            for attention in choices("keep_attention_layers", range(work.layers - min(keep, work.layers) + 1)):
                yield MemoryPlan(keep, attention, output, offload, tile, chunk, ahead)
