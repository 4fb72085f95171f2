"""What do memory and time of a training step depend on? Sizes in bytes, computed from a model's config.

Shapes in the comments: N tokens of a micro-batch, H hidden size, I MLP size, A query heads and K key/value heads of
D numbers each, L layers, r rank.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from component.adapter import full_copies, linear_names, target_layers
from component.attention.shift_short import HEAD_TOKENS, left_tokens
from component.attention.ulysses import splits_heads
from component.loss import eval_chunk
from component.model import without_weights

GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: value, block scale, scale of scales


@dataclass(frozen=True)
class Workload:
    """Everything besides the memory plan that memory and time of a training step depend on."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    weights: int  # in the linear layers of all decoder layers
    embeddings: int  # parameters of the token embedding and lm_head
    rank: int
    trained: int  # trainable parameters
    tokens: int  # N, of one micro-batch; with sequence parallelism, of a process's part of it
    group: int  # attention span in tokens: the S2-Attn group, or the full row
    value_bytes: int = 2  # of the compute dtype
    in_4bit: bool = True
    in_float8: bool = False  # products with frozen weights, on decoder layers
    float8_forward: bool = True  # with `in_float8`, also those of the forward pass, not only gradients of activations
    fused: bool = True  # Liger's norms, rope and SwiGLU
    optimizer: str = "paged_adamw_32bit"
    zero: bool = True  # DeepSpeed ZeRO-2: half-precision trainable parameters with fp32 master weights
    offload_optimizer: bool = False
    head: int = 0  # parameters of lm_head, if it is trained in full
    processes: int = 1  # of the run
    sequence_processes: int = 1  # that share a row
    shards: int = 1  # processes over which weights are partitioned, by ZeRO-3
    rows: int = 1  # of a micro-batch
    full_steps: bool = False  # whether some steps train with full attention
    eval_rows: int = 0  # of an evaluation batch; 0: no evaluation
    eval_tokens: int = 0  # of an evaluation batch


def workload(
    config: PretrainedConfig,
    *,
    target_names: list[str] | None,
    rank: int,
    train_embedding: bool = False,
    train_norm: bool = False,
    **rest: Any,
) -> Workload:
    """The workload of training a model of `config`; `rest`: the fields that do not follow from config and adapter."""
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
    """Bytes of one layer's tensors for all N tokens."""

    def __init__(self, work: Workload):
        n, value = work.tokens, work.value_bytes
        self.hidden = n * work.hidden * value
        self.query = n * work.heads * work.head_size * value
        self.key = n * work.kv_heads * work.head_size * value
        self.mlp = n * work.mlp * value
        self.low = n * work.rank * value
        self.lse = n * work.heads * 4
        # Hugging Face's eager norm saves an fp32 copy of its input, Liger's only the input itself
        self.norm = 0 if work.fused else n * work.hidden * 4
        self.left = left_bytes(work)
        # by heads, attention's output exists twice: for the kernel's heads, and for this process's tokens
        is_by_heads = work.full_steps and work.sequence_processes > 1
        self.by_heads = self.query if is_by_heads else 0
        # saved by a layer's attention: normed input, q, k, v, output, log-sum-exp, LoRA's A x
        self.graph = self.hidden + 2 * self.query + 2 * self.key + self.lse + self.norm + 4 * self.low
        self.graph += self.by_heads
        self.attention = self.graph + 2 * self.hidden  # plus the inputs of the layer and of the MLP
        self.gate_and_up = 2 * self.mlp + 3 * self.low
        self.fixed = fixed_bytes(work)
        self.gathered, self.gathered_head = gathered_bytes(work)
        self.mlp_weights = 3 * work.hidden * work.mlp * value if work.in_4bit else 0


@lru_cache(maxsize=8)
def sizes(work: Workload) -> Sizes:
    return Sizes(work)


def input_share(work: Workload) -> float:
    """Share of a layer's linear weights in q, k and v."""
    return work.hidden * (work.heads + 2 * work.kv_heads) * work.head_size * work.layers / work.weights


def left_bytes(work: Workload) -> int:
    """Keys and values that a process needs from its left, if all heads were fetched at once.

    See component/attention/exchange.py.
    """
    parts, tokens = work.sequence_processes, work.tokens // work.rows
    needed = 0
    if work.group < parts * tokens:
        needed = max(left_tokens(work.group, tokens, parts))
    if work.full_steps and not splits_heads(work.heads, work.kv_heads, parts):
        needed = (parts - 1) * tokens
    return 2 * work.rows * needed * work.kv_heads * work.head_size * work.value_bytes


def loss_bytes(work: Workload, chunk: int) -> float:
    """Logits and their gradients, `chunk` numbers each, and of a trained lm_head its gradient's fp32 sum and one
    chunk's contribution, and its 16-bit copy.
    """
    logits = chunk * (2 * work.value_bytes + 8)
    is_copied = not work.zero and work.value_bytes < 4  # DeepSpeed's own are in 16 bits
    return logits + work.head * (4 + work.value_bytes * (1 + is_copied))


def attention_backward_bytes(work: Workload, size: Sizes) -> float:
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


def evaluation_bytes(work: Workload, loss_chunk_tokens: int) -> float:
    """Bytes of an evaluation batch: Hugging Face's MLP, whose output LoRA's is added to, or one chunk of the loss."""
    n, value = work.eval_tokens, work.value_bytes
    weight = work.hidden * work.mlp * value if work.in_4bit else 0
    layer = 5 * n * work.mlp * value + weight  # act(gate), up, LoRA's part, that scaled, their sum
    chunk = eval_chunk(loss_chunk_tokens, work.eval_rows) * work.eval_rows
    logits = min(chunk, n) * work.vocabulary * (value + 8)  # in both dtypes, and their softmax
    gathered, head = gathered_bytes(work)
    return 2 * n * work.hidden * value + max(layer + gathered, logits + head)


def fixed_bytes(work: Workload) -> float:
    """Weights, trainable parameters, gradients and optimizer states held during forward and backward passes."""
    weights = work.weights * _stored(work) / work.shards + work.weights * (NF4_BYTES - 0.5 if work.in_4bit else 0)
    per_trained = 2.0 if work.zero else 4.0
    if not work.zero:
        per_trained += 4 if work.processes == 1 else 4 + 4  # gradients, and DDP's buckets
    elif not work.offload_optimizer:
        per_trained += 4 + 2  # fp32 master weights, half-precision gradients
    if not work.offload_optimizer:
        name = work.optimizer
        per_trained += 0 if "paged" in name or "sgd" in name else 2 if "8bit" in name else 8
    return weights + (work.embeddings * work.value_bytes + work.trained * per_trained) / work.shards


def _stored(work: Workload) -> float:
    """Bytes of a weight, without the scales of 4-bit blocks, which ZeRO-3 does not partition."""
    return 0.5 if work.in_4bit else work.value_bytes


def gathered_bytes(work: Workload) -> tuple[float, float]:
    """What ZeRO-3 holds whole: weights of a layer and of the next, on its way; and in the loss those of lm_head."""
    if work.shards == 1:
        return 0.0, 0.0
    layer = (work.weights * _stored(work) + work.trained * work.value_bytes) / work.layers
    return 2 * layer, work.vocabulary * work.hidden * work.value_bytes


def paged_bytes(work: Workload) -> float:
    """Paged optimizer states: on the GPU while they fit, but outside PyTorch's allocator."""
    return 8.0 * work.trained / work.shards if "paged" in work.optimizer and not work.offload_optimizer else 0.0


def host_optimizer_bytes(work: Workload) -> float:
    """CPU memory of one process's share of offloaded optimizer states: fp32 weights, gradients and two moments."""
    return 16.0 * work.trained / work.processes if work.offload_optimizer else 0.0


def step_bytes(work: Workload) -> float:
    """What the optimizer step needs on top of `fixed_bytes`; activations are freed by then."""
    return 4.0 * work.trained / work.shards if work.zero and not work.offload_optimizer else 0.0
