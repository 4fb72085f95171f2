"""What does KV-cache quantization cost? Perplexity and logits of each cache, compared with the unquantized one.

The first half of a window, at least one block, is prefilled; the second half is decoded token by token, so that every
prediction there attends to quantized keys and values.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from component.error import UserError
from component.inference.kv_cache import new_cache, tensor_bytes
from component.inference.quantized_layer import BLOCK

LEAST = 2 * BLOCK  # tokens of a window: of fewer, the first half fills no block, and nothing is quantized


@dataclass
class QuantizedCacheResult:
    """Results of one cache; logits are compared with the dynamic cache's at each position."""

    cache: str
    bytes_per_window: int  # at the end of a window
    perplexity: float  # of the second halves
    logit_change: float  # mean absolute difference
    same_choice: float  # share of positions with the same top-1 token


@torch.no_grad()
def second_half(model: PreTrainedModel, ids: torch.Tensor, implementation: str) -> tuple[torch.Tensor, int]:
    """Logits (T - T // 2, V) that predict the second half of `ids` (T,), and the final bytes of the cache."""
    cache = new_cache(model.config, implementation)
    half = len(ids) // 2
    logits = [model(ids[None, :half], past_key_values=cache).logits[0, -1:]]
    for at in range(half, len(ids) - 1):
        logits.append(model(ids[None, at : at + 1], past_key_values=cache).logits[0])
    return torch.cat(logits).float(), tensor_bytes(cache)


def measure_cache_quantization(
    model: PreTrainedModel, tokens: np.ndarray, caches: Iterable[str], seq_len: int, windows: int
) -> list[QuantizedCacheResult]:
    """Measure each cache on the first `windows` windows of `seq_len` tokens.

    Raises:
        UserError: windows in which nothing would be quantized, or a file that is shorter than one window.
    """
    if seq_len < LEAST:
        raise UserError(
            f"--seq_len: {seq_len}; use at least {LEAST}: keys and values are quantized in blocks of {BLOCK} tokens, "
            "and the first half of a window must fill one"
        )
    count = min(windows, len(tokens) // seq_len)
    if count < 1:
        shorter = f"use from {LEAST} to {len(tokens)}, or " if len(tokens) >= LEAST else "use "
        raise UserError(f"--seq_len: {len(tokens)} tokens hold no window of {seq_len}; {shorter}a longer file")
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in caches}
    cache_bytes: dict[str, int] = {}
    for start in tqdm(range(0, count * seq_len, seq_len), unit="window", disable=None):
        ids = torch.from_numpy(tokens[start : start + seq_len].astype(np.int64)).to(model.device)
        exact, _ = second_half(model, ids, "dynamic")
        for name, total in sums.items():
            logits, cache_bytes[name] = second_half(model, ids, name)
            loss = cross_entropy(logits, ids[seq_len // 2 :])
            same = (logits.argmax(-1) == exact.argmax(-1)).float().mean()
            total += torch.stack([loss, (logits - exact).abs().mean(), same]).double().cpu() / count
    return [
        QuantizedCacheResult(name, cache_bytes[name], float(total[0].exp()), float(total[1]), float(total[2]))
        for name, total in sums.items()
    ]
