"""Which memory plan fits, and is the fastest that does? Arithmetic on the config alone: no weights, no GPU.

Memory is counted tensor by tensor at the three moments where it can peak: while the loss is computed, while a layer's
MLP goes backward, and while its attention does. Time is counted in products and in bytes to the host, only to compare
plans with each other.

Shapes in the comments: N tokens of a micro-batch, H hidden size, I MLP size, A query heads and K key/value heads of
D numbers each, L layers, r rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from component.error import UserError

GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight: its value, its share of a block's scale, and of that's scale
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
    mlp_tile_tokens: int
    loss_chunk_tokens: int

    def levels(self, layers: int) -> list[str]:
        """Of each of `layers` layers, in order."""
        everything = min(self.keep_layers, layers)
        attention = min(self.keep_attention_layers, layers - everything)
        nothing = layers - everything - attention
        return ["nothing"] * nothing + ["attention"] * attention + ["everything"] * everything


@dataclass(frozen=True)
class Workload:
    """All that memory and time depend on, beside the plan."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    weights: int  # in the linear layers of all decoder layers
    embeddings: int  # numbers in the token embedding and lm_head
    rank: int
    trained: int  # parameters that train
    tokens: int  # N, of one micro-batch
    group: int  # tokens that attention reaches over: a group of S2-Attn, or the whole row
    value_bytes: int = 2  # of what is computed in
    in_4bit: bool = True
    fused: bool = True  # Liger's norms, rope and SwiGLU
    optimizer: str = "paged_adamw_32bit"
    zero: bool = True  # DeepSpeed's ZeRO-2: trained parameters in half precision with fp32 masters
    offload_optimizer: bool = False
    accumulation: int = 1


@dataclass(frozen=True)
class Estimate:
    peak_gib: float  # that PyTorch's allocator must hold on the GPU
    host_gib: float  # pinned for activations
    cost: float  # of a step's products and transfers, in units of no meaning but to compare plans
    moment: str  # when the peak comes


def workload(config: PretrainedConfig, *, target_names: list[str] | None, rank: int, full_names: list[str], **rest) -> Workload:
    """The workload of training a model of `config`; `rest` are the fields that the config does not know."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    linears = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    wanted = [
        m for n, m in {**linears, "lm_head": head}.items()
        if (n != "lm_head" if target_names is None else any(n == t or n.endswith(f".{t}") for t in target_names))
    ]  # fmt: skip
    lora = sum(rank * (m.in_features + m.out_features) for m in wanted)
    copies = sum(m.weight.numel() for n, m in model.named_modules() if n.rpartition(".")[2] in full_names)
    embeddings = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), head)}
    return Workload(
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        weights=sum(m.weight.numel() for m in linears.values()),
        embeddings=sum(embeddings.values()),
        rank=rank,
        trained=lora + copies,
        **rest,
    )


class Sizes:
    """Bytes of the tensors of one layer for all N tokens."""

    def __init__(self, work: Workload):
        n, value = work.tokens, work.value_bytes
        self.hidden = n * work.hidden * value
        self.query = n * work.heads * work.head_size * value
        self.key = n * work.kv_heads * work.head_size * value
        self.mlp = n * work.mlp * value
        self.low = n * work.rank * value
        self.log_sum = n * work.heads * 4
        # the eager norm of Hugging Face keeps its input in fp32, Liger's the input as it came
        self.norm = 0 if work.fused else n * work.hidden * 4
        self.attention = (  # what attention keeps: normed, q, k, v, output, and the MLP's input
            2 * self.hidden + 2 * self.query + 2 * self.key + self.log_sum + self.norm + 4 * self.low
        )
        self.gate_and_up = 2 * self.mlp + 3 * self.low
        self.mlp_weights = 3 * work.hidden * work.mlp * value if work.in_4bit else 0


def fixed_bytes(work: Workload) -> float:
    """Weights, trained parameters, their gradients and optimizer states that are there while activations are."""
    weights = work.weights * (NF4_BYTES if work.in_4bit else work.value_bytes)
    per_trained = 2.0 if work.zero else 4.0
    if not work.zero:
        per_trained += 4  # gradients
    elif not work.offload_optimizer:
        per_trained += 4 + 2  # fp32 masters, half gradients
    if not work.offload_optimizer:
        name = work.optimizer
        per_trained += 0 if "paged" in name or "sgd" in name else 2 if "8bit" in name else 8
    return weights + work.embeddings * work.value_bytes + work.trained * per_trained


def step_bytes(work: Workload) -> float:
    """What the optimizer's step needs on top of `fixed_bytes`, when no activation is left."""
    return 4.0 * work.trained if work.zero and not work.offload_optimizer else 0.0


def estimate(work: Workload, plan: MemoryPlan) -> Estimate:
    """Peak memory, host memory and cost of one step of `work` under `plan`."""
    size, levels = Sizes(work), plan.levels(work.layers)
    nothing, attention, everything = (levels.count(name) for name in ("nothing", "attention", "everything"))
    waiting = size.hidden + (size.query if plan.keep_attention_output else 0)
    log_sums = size.log_sum * nothing if plan.keep_attention_output else 0
    inputs = 0 if plan.offload_activations else waiting * nothing
    if plan.offload_activations and nothing:
        inputs = min(2, nothing) * waiting  # one on its way out, or coming back ahead of need
    kept = inputs + log_sums + attention * size.attention + everything * (size.attention + size.gate_and_up)
    chunk = min(plan.loss_chunk_tokens, work.tokens) * work.vocabulary * (2 * work.value_bytes + 8)
    moments = {"loss": kept + 3 * size.hidden + chunk, "optimizer": step_bytes(work)}
    top = "everything" if everything else "attention" if attention else "nothing"
    for level in {top, "nothing" if nothing else top}:
        here = kept if level == top else inputs + log_sums
        working = size.attention if level == "nothing" else 0
        moments[f"MLP of a layer that keeps {level}"] = here + working + _mlp_backward(work, plan, size, level)
        moments[f"attention of a layer that keeps {level}"] = here + working + _attention_backward(size)
    moment = max(moments, key=moments.__getitem__)
    host = waiting * nothing if plan.offload_activations else 0
    return Estimate((fixed_bytes(work) + moments[moment]) / GIB, host / GIB, _cost(work, plan, size, levels), moment)


def _mlp_backward(work: Workload, plan: MemoryPlan, size: Sizes, level: str) -> float:
    share = min(1.0, plan.mlp_tile_tokens / work.tokens) if plan.mlp_tile_tokens else 1.0
    buffers = 4 if work.fused else 8  # gate, up, their product and its gradient; eager functions write new ones
    if level == "everything":
        buffers -= 2
    return 2 * size.hidden + share * (buffers * size.mlp + 4 * size.hidden + size.norm) + size.mlp_weights


def _attention_backward(size: Sizes) -> float:
    return 3 * size.hidden + 2 * size.query + 2 * size.key + 2 * size.query


def _cost(work: Workload, plan: MemoryPlan, size: Sizes, levels: list[str]) -> float:
    n, per_layer = work.tokens, work.weights / work.layers
    matrix = work.hidden * work.mlp
    products, pairs = 2 * n * per_layer, 2 * n * work.group * work.heads * work.head_size * 1.7
    again = {
        "nothing": products - 2 * n * matrix + (0 if plan.keep_attention_output else pairs),
        "attention": 4 * n * matrix,
        "everything": 0.0,
    }
    tiles = -(-n // plan.mlp_tile_tokens) if plan.mlp_tile_tokens else 1
    small = sum(max(0, 2048 - size) for size in (plan.mlp_tile_tokens or 2048, plan.loss_chunk_tokens))
    cost = sum(2 * products + 3.5 * pairs + again[level] for level in levels) * (1 + 1e-6 * small) + tiles * 1e9
    if plan.offload_activations:  # copies cost nothing beside a layer that computes for longer; a little all the same
        moved = size.hidden + (size.query if plan.keep_attention_output else 0)
        late = max(0.0, moved * 25e3 - (products + pairs))
        cost += levels.count("nothing") * (2 * late + moved * 1e3)
    return cost


def choose(work: Workload, budget_gib: float, host_gib: float, **by_hand: Any) -> tuple[MemoryPlan, Estimate]:
    """The fastest plan within `budget_gib` of the GPU and `host_gib` of the host; of those equally fast the leanest.

    Args:
        by_hand: levers that the user has set, by the names of `MemoryPlan`; those that are None are chosen.

    Returns:
        The plan and its estimate; where nothing fits, the leanest plan there is.
    """
    plans = [(plan, estimate(work, plan)) for plan in _candidates(work, by_hand)]
    fitting = [pair for pair in plans if pair[1].peak_gib <= budget_gib and pair[1].host_gib <= host_gib]
    if fitting:
        return min(fitting, key=lambda pair: (pair[1].cost, pair[1].peak_gib))
    return min(plans, key=lambda pair: (pair[1].peak_gib, pair[1].cost))


def _candidates(work: Workload, by_hand: dict[str, Any]) -> Iterator[MemoryPlan]:
    def choices(name: str, free) -> list:
        return list(free) if by_hand.get(name) is None else [by_hand[name]]

    tiles = [tile for tile in TILES if tile < work.tokens]
    rest = product(
        choices("keep_attention_output", (False, True)),
        choices("offload_activations", (False, True)),
        choices("mlp_tile_tokens", tiles),
        choices("loss_chunk_tokens", [c for c in CHUNKS if c <= work.tokens] or [work.tokens]),
    )
    for output, offload, tile, chunk in rest:
        for keep in choices("keep_layers", range(work.layers + 1)):
            for attention in choices("keep_attention_layers", range(work.layers - min(keep, work.layers) + 1)):
                yield MemoryPlan(keep, attention, output, offload, tile, chunk)
