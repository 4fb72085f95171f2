"""Key tokens by their definition, slow and plain: one forward pass per token and context, with full logits in float64.

LongPPL (arXiv 2410.23771): token p of a text, counted from 0, is key if its log-likelihood after all tokens before it
exceeds that after a short context by more than alpha, and exceeds beta. The short context begins at the last of
0, stride, 2 stride ... that leaves at least `context` tokens; without one, p is not key.
"""

import copy
from collections.abc import Callable

import torch


def log_likelihoods(model) -> Callable[[list[int]], float]:
    """Log-likelihood, in float64, of the last of some ids after those before it."""
    exact = copy.deepcopy(model).double()

    def of_last(ids: list[int]) -> float:
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0, -1]
        return logits.log_softmax(-1)[ids[-1]].item()

    return of_last


def key_tokens(model, ids: list[int], context: int, stride: int, alpha: float, beta: float) -> list[int]:
    """Their positions; none of them, and no other token, is close to a threshold."""
    of_last, found = log_likelihoods(model), []
    for position in range(context, len(ids)):
        start = max(start for start in range(0, len(ids), stride) if position - start >= context)
        full = of_last(ids[: position + 1])
        gain = full - of_last(ids[start : position + 1])
        assert min(abs(gain - alpha), abs(full - beta)) > 1e-5, "too close to tell in float32"
        if gain > alpha and full > beta:
            found.append(position)
    return found
