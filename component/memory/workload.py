"""What do memory and time of a training step depend on? Counted from a model's config, byte by byte.

Shapes in the comments: N tokens of a micro-batch, H hidden size, I MLP size, A query heads and K key/value heads of
D numbers each, L layers, r rank.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from component.adapter import full_copies, linear_names, target_layers
from component.model import without_weights

GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight: its value, its share of a block's scale, and of that's scale


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
    head: int = 0  # numbers of lm_head, if it trains as a full copy


def workload(
    config: PretrainedConfig,
    *,
    target_names: list[str] | None,
    rank: int,
    train_embedding: bool = False,
    train_norm: bool = False,
    **rest: Any,
) -> Workload:
    """The workload of training a model of `config`; `rest` are the fields that config and adapter do not tell."""
    model = without_weights(config)
    linears = [m for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    targets = [m for _, m in target_layers(model, target_names or linear_names(model))]
    copies = full_copies(model, train_embedding, train_norm)
    copied = sum(m.weight.numel() for name, m in model.named_modules() if name.rpartition(".")[2] in copies)
    embeddings = {
        id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    return Workload(
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        weights=sum(m.weight.numel() for m in linears),
        embeddings=sum(embeddings.values()),
        rank=rank,
        head=model.get_output_embeddings().weight.numel() if train_embedding else 0,
        trained=copied + sum(rank * (m.in_features + m.out_features) for m in targets),
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
        # in the graph of a layer's attention: normed, q, k, v, what of attention's output, log-sum-exp, A x of LoRA
        self.graph = self.hidden + 2 * self.query + 2 * self.key + self.log_sum + self.norm + 4 * self.low
        self.attention = self.graph + 2 * self.hidden  # and the layer's and the MLP's input
        self.gate_and_up = 2 * self.mlp + 3 * self.low
        self.fixed = fixed_bytes(work)
        self.mlp_weights = 3 * work.hidden * work.mlp * value if work.in_4bit else 0


@lru_cache(maxsize=8)
def sizes(work: Workload) -> Sizes:
    return Sizes(work)


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


def paged_bytes(work: Workload) -> float:
    """Optimizer states in managed memory: on the card while there is room, but not in PyTorch's allocator."""
    return 8.0 * work.trained if "paged" in work.optimizer and not work.offload_optimizer else 0.0


def step_bytes(work: Workload) -> float:
    """What the optimizer's step needs on top of `fixed_bytes`, when no activation is left."""
    return 4.0 * work.trained if work.zero and not work.offload_optimizer else 0.0
