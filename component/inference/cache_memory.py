"""Does generation fit in memory, with which KV cache? Arithmetic on the model's config alone: no weights, no GPU."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PretrainedConfig

from component.error import UserError
from component.inference.block_attention import supports_blocks
from component.inference.kv_cache import CHUNK, has_fixed_frequencies, is_quantizable
from component.inference.quantized_layer import BLOCK, FORMATS, SEGMENT, capacity
from component.memory.budget import HOST_SHARE, USABLE, most_tokens
from component.memory.host import free_host_bytes
from component.memory.plan import IDLE_GIB
from component.memory.workload import GIB, NF4_BYTES, Workload, workload
from component.rope import context_length

# Best first. Integers with a scale per 64 numbers are more exact than fp8, and those of 8 bits change next to nothing.
# `offloaded` is exact, but each token waits until all keys and values have crossed the bus: 64 GiB for LLaMA2-7B at
# 131072 tokens, seconds per token, so int4 comes first. int2 costs too much quality to be chosen unasked.
PREFERENCE = ("dynamic", "int8", "fp8", "int4", "offloaded")
EXACT = ("dynamic", "offloaded")  # for several rows, which differ in length, and for sliding windows
CHUNKS = (CHUNK, 2048, 1024, 512)  # tokens per forward pass while a prompt is read
KERNELS_GIB = 0.2  # workspaces of libraries, inside PyTorch's allocator; fitted to an H100
OUTSIDE_GIB = 0.6  # cuBLAS, cuDNN, Triton's and bitsandbytes' kernels: outside PyTorch's allocator


@dataclass(frozen=True)
class Reading:
    """What the memory of generation depends on, besides the cache."""

    config: PretrainedConfig
    in_4bit: bool
    value_bytes: int = 2  # of the compute dtype
    rows: int = 1  # answered at once
    attention: str = "sdpa"  # `--attn_implementation`

    def reads_parts(self, tokens: int) -> bool:
        """Whether new tokens attend to earlier ones part by part, see component/inference/block_attention.py."""
        return self.attention == "sdpa" and supports_blocks(self.config, tokens)

    @cached_property
    def work(self) -> Workload:
        return workload(self.config, target_names=None, rank=1, tokens=1, group=1, in_4bit=self.in_4bit)


@dataclass(frozen=True)
class Need:
    """Bytes on the GPU while the last tokens of a context are read, and of CPU memory."""

    cache_name: str
    chunk: int  # tokens per forward pass
    weights: float
    cache: float
    workspace: float
    host: float = 0

    @property
    def peak(self) -> float:
        return self.weights + self.cache + self.workspace


def cache_bytes(config: PretrainedConfig, name: str, tokens: int, value_bytes: int = 2) -> int:
    """Bytes of all keys and values, with their scales, of one row of `tokens` tokens."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = config.num_key_value_heads * head_size  # per layer and token, of keys and as many of values
    if name not in FORMATS:
        return 2 * config.num_hidden_layers * tokens * numbers * value_bytes
    stored = FORMATS[name]
    block = 2 * BLOCK * numbers * stored.bits // 8
    for is_key in (True, False):
        of_tokens, of_channels = stored.groups(head_size, is_key)
        scales = BLOCK // of_tokens * numbers // of_channels
        block += scales * value_bytes * (2 if stored.has_zero else 1)
    recent = 2 * BLOCK * numbers * value_bytes  # room for the tokens after the last full block
    return config.num_hidden_layers * (capacity(tokens // BLOCK) * block + recent)


def weight_bytes(work: Workload, value_bytes: int) -> float:
    """Embeddings and lm_head are never in 4 bits; norms and biases are too small to count."""
    return work.weights * (NF4_BYTES if work.in_4bit else value_bytes) + work.embeddings * value_bytes


def need(reading: Reading, name: str, tokens: int, chunk: int) -> Need:
    """Memory of reading `tokens` tokens, answer included, in forward passes of `chunk`."""
    work, size, chunk_tokens = reading.work, reading.value_bytes, min(chunk, tokens)
    numbers, query = work.kv_heads * work.head_size, work.heads * work.head_size
    layer = reading.rows * tokens * numbers * size  # keys, or values, of one layer, as computed
    # hidden states, their normed copy and an fp32 one; queries, keys, values, before and after rotation; the output of
    # two parts, merged in fp32. Or the MLP's gate, up and product.
    attention = work.hidden * 2 * size + (3 * query + 4 * numbers) * size + 4 * 4 * query
    mlp = work.hidden * (2 * size + 4) + 3 * work.mlp * size
    logits = 3 * 4 * work.vocabulary  # fp32, and copies while sampling
    workspace = (IDLE_GIB + KERNELS_GIB) * GIB + reading.rows * (chunk_tokens * max(attention, mlp) + logits)
    workspace += work.hidden * work.mlp * size if reading.in_4bit else 0  # the largest matrix, dequantized
    if not reading.reads_parts(tokens):  # a mask; and eagerly, scores of each head, and their softmax in fp32
        pair = {"sdpa": 1 + size, "eager": 1 + size + work.heads * (2 * size + 4)}.get(reading.attention, 0)
        workspace += reading.rows * chunk_tokens * tokens * pair
    cache, host = float(reading.rows * cache_bytes(reading.config, name, tokens, size)), 0.0
    if name == "offloaded":
        # this layer's and the next one's keys and values, one of them twice while it grows; a stored copy on its way
        cache, host, workspace = 0, cache, workspace + 7 * layer
    elif name == "dynamic":
        workspace += layer  # it grows by copying
    elif reading.reads_parts(tokens):
        segment = min(tokens, SEGMENT * BLOCK)
        # a dequantized segment and its codes in bytes; or what quantizing a forward pass's keys takes, in fp32
        workspace += max(segment * numbers * (2 * size + 2), chunk_tokens * numbers * 4 * 4)
    else:
        workspace += 5 * layer  # all keys and values dequantized
    return Need(name, chunk, weight_bytes(work, size), cache, workspace, host)


def fits(found: Need, available: float, host: float) -> bool:
    return found.peak <= available and found.host <= host


def best_chunk(reading: Reading, name: str, tokens: int, available: float, host: float) -> Need | None:
    """The longest forward passes with which a cache fits; None if it does not."""
    needs = (need(reading, name, tokens, chunk) for chunk in chunks_of(reading, tokens))
    return next((found for found in needs if fits(found, available, host)), None)


def chunks_of(reading: Reading, tokens: int) -> tuple[int, ...]:
    """Tokens per forward pass with which a text may be read, the most first."""
    is_whole = reading.rows > 1 or not has_fixed_frequencies(reading.config)
    return (tokens,) if is_whole else CHUNKS


def least_need(reading: Reading, name: str, tokens: int) -> Need:
    """Memory with the shortest forward passes with which a text may be read."""
    return need(reading, name, tokens, chunks_of(reading, tokens)[-1])


def candidates(reading: Reading) -> tuple[str, ...]:
    """The caches that `auto` may choose, best first."""
    return PREFERENCE if reading.rows == 1 and is_quantizable(reading.config) else EXACT


def choose_cache(reading: Reading, tokens: int, available: float, host: float) -> Need:
    """The first cache of PREFERENCE that fits.

    Args:
        tokens: the longest text, answer included.
        available, host: bytes of GPU and of CPU memory.

    Raises:
        UserError: none does.
    """
    names = candidates(reading)
    for name in names:
        found = best_chunk(reading, name, tokens, available, host)
        if found:
            return found
    least = min((least_need(reading, name, tokens) for name in names if name != "offloaded"), key=_peak)
    longest = max(longest_context(reading, name, available, host) for name in names)
    rows = f" in {reading.rows} rows" if reading.rows > 1 else ""
    cures = [f"shorten the text to {longest} tokens"] if longest else []
    cures += [] if reading.in_4bit else ["load the weights with --load_in_4bit"]
    cures += ["set --batch_size 1"] if reading.rows > 1 else []
    raise UserError(
        f"--cache_implementation: auto finds none for {tokens} tokens{rows}: {least.cache_name} needs "
        f"{least.peak / GIB:.1f} GiB ({least.weights / GIB:.1f} of weights, {least.cache / GIB:.1f} of keys and "
        f"values), and of GPU memory {available / GIB:.1f} GiB are free, of CPU memory {host / GIB:.1f}; "
        f"{', '.join([*cures, 'free memory'])}, or name a cache to try it with shorter texts"
    )


def choose_for_context(reading: Reading, available: float, host: float) -> tuple[Need, int]:
    """The cache for the model's whole context, or for the longest texts that fit, and their tokens.

    Raises:
        UserError: not even short texts fit.
    """
    context = context_length(reading.config)
    try:
        return choose_cache(reading, context, available, host), context
    except UserError:
        # of those with which equally long texts fit, the best; offloaded would make short texts slow too
        names = [name for name in candidates(reading) if name != "offloaded"]
        longest = {name: longest_context(reading, name, available, host) for name in names}
        name = max(longest, key=lambda name: longest[name])
        found = best_chunk(reading, name, longest[name], available, host) if longest[name] else None
        if found is None:
            raise
        return found, longest[name]


def _peak(found: Need) -> float:
    return found.peak


def longest_context(reading: Reading, name: str, available: float, host: float) -> int:
    """The longest context with which a cache fits, as `most_tokens` counts it."""

    return most_tokens(lambda tokens: best_chunk(reading, name, tokens, available, host) is not None)


def available_memory(device: torch.device) -> tuple[float, float]:
    """Bytes of GPU memory and of CPU memory that generation may use; both infinite without a GPU.

    A cap by `torch.cuda.set_per_process_memory_fraction` counts.
    """
    if device.type != "cuda":
        return math.inf, math.inf
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    capped = torch.cuda.get_per_process_memory_fraction(device) * total - held
    return USABLE * min(free - OUTSIDE_GIB * GIB, capped), HOST_SHARE * free_host_bytes()


def describe_choice(found: Need, tokens: int, context: int) -> str:
    """One line for the start of a program; `tokens` of the model's `context` fit."""
    first = "" if found.cache_name == PREFERENCE[0] else f", as {PREFERENCE[0]} does not fit"
    limit = f"; longer texts do not fit, of the model's {context}" if tokens < context else ""
    return (
        f"KV cache: {found.cache_name}{first}; at {tokens} tokens {found.cache / GIB:.1f} GiB, with weights and "
        f"workspace {found.peak / GIB:.1f} GiB{limit}"
    )
