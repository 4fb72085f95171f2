"""Which tokens need a long context? The key tokens of LongPPL (arXiv 2410.23771), found by an evaluator model.

A token is key if the evaluator's log-likelihood of it is higher by more than alpha with the whole context of its
window than with a short context of about K tokens, and if it is above beta with the whole context. LongPPL is the
perplexity over the key tokens alone, all of them weighted the same.

Short contexts of exactly K tokens would take a forward pass per token. As in the published code (PKU-ML/LongPPL,
package longppl 0.3.0), blocks of K + stride tokens start every `stride` tokens of a window, and the last `stride`
tokens of a block are scored; the last block of a window may be shorter. So a token at position p >= K of a window has
K + (p - K) mod stride tokens of short context. The short context of the first K + stride tokens of a window is their
whole context: they can't be key, and their block is not computed. All other tokens are computed about
(K + stride) / stride times, 5 by default.

Differences from the published code: there, texts are single documents and key tokens are passed on as spans of
characters, so that models with other tokenizers can be measured; here, windows and token ids are those of the plain
perplexity, and the evaluator has the measured model's tokenizer.

Shapes: B windows of T tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from component.distributed.world import results_once
from component.evaluate.perplexity import KeyTokenSource, Window, window_losses
from component.evaluate.split import losses_of


@dataclass(frozen=True)
class KeyTokenRule:
    """When a token is key. The defaults are the published values."""

    context: int = 4096  # K, tokens of short context
    stride: int = 1024  # tokens that share a short context
    alpha: float = 2.0  # nats, at least 0: least gain in log-likelihood from the long context
    beta: float = -2.0  # nats: least log-likelihood with the long context

    @property
    def first(self) -> int:
        """The first position in a window that can be key; windows of as many tokens have no key token."""
        return self.context + self.stride


def is_key(full: Tensor, short: Tensor, rule: KeyTokenRule) -> Tensor:
    """Whether tokens are key, by their losses in nats with the whole and the short context; both bounds are strict."""
    return (short - full > rule.alpha) & (-full > rule.beta)


def key_mask(model: PreTrainedModel, ids: Tensor, losses: Tensor, rule: KeyTokenRule, first_scored: int = 1) -> Tensor:
    """Which tokens of windows are key; one block of K + stride tokens of each window is computed at a time.

    Args:
        model: the evaluator.
        ids: (B, T).
        losses: (B, T - 1), the evaluator's with the whole context, entry t of token t + 1.
        first_scored: blocks that end before this position are left out.

    Returns:
        (B, T - 1), entry t of token t + 1.
    """
    found = torch.zeros_like(losses, dtype=torch.bool)
    length = ids.shape[1]
    for start in range(rule.stride, length - rule.context, rule.stride):
        end = min(start + rule.first, length)
        if end > first_scored:
            scored = slice(start + rule.context - 1, end - 1)
            short = losses_of(model, ids[:, start:end])[:, rule.context - 1 :]
            found[:, scored] = is_key(losses[:, scored], short, rule)
    return found


class KeyTokenFinder:
    """Finds the key tokens of windows, of which `model` has just computed the losses, and keeps them."""

    def __init__(self, model: PreTrainedModel, windows: list[Window], rule: KeyTokenRule) -> None:
        self._model, self._windows, self._rule = model, windows, rule
        self._found: dict[int, np.ndarray] = {}

    def __call__(self, batch: range, ids: Tensor, losses: Tensor) -> list[np.ndarray]:
        """A `KeyTokenSource`: the positions of the scored key tokens of each window of a batch, ascending."""
        firsts = [self._windows[number].first_scored - self._windows[number].start for number in batch]
        mask = key_mask(self._model, ids, losses, self._rule, min(firsts)).cpu().numpy()
        for number, row, first in zip(batch, mask, firsts, strict=True):
            positions = np.flatnonzero(row) + 1
            self._found[number] = positions[positions >= first]
        return [self._found[number] for number in batch]

    def positions(self) -> list[list[int]]:
        """Of each window, after all processes have worked through their windows; collective."""
        found = dict(results_once(list(self._found.items())))
        return [found[number].tolist() for number in range(len(self._windows))]


def find_key_tokens(
    model: PreTrainedModel, tokens: np.ndarray, windows: list[Window], rule: KeyTokenRule, batch_size: int = 1
) -> list[list[int]]:
    """The positions of the key tokens of each window; all processes share the work, and each gets the result."""
    if windows[0].end <= rule.first:  # the first window starts at 0, and all have its length
        return [[] for _ in windows]
    finder = KeyTokenFinder(model, windows, rule)
    for batch, ids, losses in window_losses(model, tokens, windows, batch_size, "key tokens, "):
        finder(batch, ids, losses)
    return finder.positions()


def known_key_tokens(positions: list[list[int]]) -> KeyTokenSource:
    """The key tokens that were found before, by window."""
    return lambda batch, ids, losses: [np.array(positions[number], dtype=np.int64) for number in batch]
