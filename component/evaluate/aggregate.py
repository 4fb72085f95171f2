"""Where is the loss high? Losses summed by window, by position in the window, and by document of the file.

Sums are float64 and are added in window order, so results do not depend on the number of processes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class WindowSum:
    """The scored tokens of one window."""

    number: int
    loss: float  # sum in nats
    tokens: int
    positions: np.ndarray  # (2, buckets): sums in nats, and token counts
    first_document: int
    documents: np.ndarray  # (2, documents in the window from first_document on): the same
    key_loss: float = 0.0  # sum over the key tokens, in nats
    key_tokens: int = 0


@dataclass
class PositionBucket:
    start: int  # first position in the window, counted from 0
    end: int  # exclusive
    tokens: int  # scored; 0 where the protocol scores none
    loss: float  # nats per token; NaN without tokens
    perplexity: float


@dataclass
class Document:
    document: int  # number in the file's index, from 0
    start: int  # its first token in the file
    tokens: int  # scored; a token scored in two windows counts twice
    loss: float
    perplexity: float


def perplexity_of(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.nan if math.isnan(loss) else math.inf  # exp(710) overflows


def sum_window(
    number: int,
    losses: torch.Tensor,
    start: int,
    first_scored: int,
    key_tokens: np.ndarray | None = None,
    *,
    seq_len: int,
    buckets: int,
    document_starts: np.ndarray | None,
) -> WindowSum:
    """Sum the losses of one window.

    Args:
        losses: (T - 1,), entry t is the loss of token `start + t + 1` of the file.
        start, first_scored: token indices in the file.
        key_tokens: positions in the window, all of scored tokens.
        seq_len: the length that is divided into buckets; the window of a shorter file is shorter.
        buckets: 0 for none.
    """
    all_losses = losses.double().cpu().numpy()
    scored = all_losses[first_scored - start - 1 :]
    keys = all_losses[[] if key_tokens is None else key_tokens - 1]
    indices = np.arange(first_scored, first_scored + len(scored))  # in the file
    bucket_of = (indices - start) * buckets // seq_len
    positions = _grouped(scored, bucket_of, buckets) if buckets else np.zeros((2, 0))
    first, documents = 0, np.zeros((2, 0))
    if document_starts is not None:
        document_of = np.searchsorted(document_starts, indices, side="right") - 1
        first = int(document_of[0])
        documents = _grouped(scored, document_of - first, int(document_of[-1]) - first + 1)
    sums = (float(scored.sum()), len(scored), positions, first, documents)
    return WindowSum(number, *sums, float(keys.sum()), len(keys))


def _grouped(losses: np.ndarray, group_of: np.ndarray, groups: int) -> np.ndarray:
    """(2, groups): sums and counts of `losses` (n,) by `group_of` (n,)."""
    return np.stack([np.bincount(group_of, weights, minlength=groups) for weights in (losses, None)])


def by_position(sums: list[WindowSum], seq_len: int, buckets: int) -> list[PositionBucket]:
    """One row per bucket of `seq_len / buckets` positions, rounded."""
    edges = [-(-bucket * seq_len // buckets) for bucket in range(buckets + 1)] if buckets else [0]
    losses, tokens = np.sum([window.positions for window in sums], axis=0)
    return [
        PositionBucket(start, end, *_mean(float(loss), int(count)))
        for start, end, loss, count in zip(edges[:-1], edges[1:], losses, tokens, strict=True)
    ]


def by_document(sums: list[WindowSum], document_starts: np.ndarray) -> list[Document]:
    """One row per document with scored tokens."""
    losses, tokens = totals = np.zeros((2, len(document_starts)))
    for window in sums:
        totals[:, window.first_document : window.first_document + window.documents.shape[1]] += window.documents
    return [
        Document(number, int(document_starts[number]), *_mean(float(losses[number]), int(tokens[number])))
        for number in np.flatnonzero(tokens).tolist()
    ]


def _mean(loss: float, tokens: int) -> tuple[int, float, float]:
    mean = loss / tokens if tokens else math.nan
    return tokens, mean, perplexity_of(mean)
