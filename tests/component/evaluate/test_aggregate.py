"""Where is the loss high? Literal losses at literal positions."""

import math

import numpy as np
import torch

from component.evaluate.aggregate import WindowSum, by_document, by_position, perplexity_of, sum_window


def summed(**changes) -> WindowSum:
    """Tokens 100 to 105 are fed to the model; those from 102 on are scored, with losses 2, 4, 8, 16."""
    values = {"start": 100, "first_scored": 102, "seq_len": 6, "buckets": 3, "document_starts": [0, 50, 103, 105]}
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])  # of tokens 101 to 105
    values |= changes
    starts = values["document_starts"]
    return sum_window(7, losses, **values | {"document_starts": None if starts is None else np.array(starts)})


def test_one_window():
    found = summed()
    assert (found.number, found.loss, found.tokens) == (7, 30.0, 4)
    assert found.positions.tolist() == [[0, 6, 24], [0, 2, 2]]
    assert found.first_document == 1
    assert found.documents.tolist() == [[2, 12, 16], [1, 2, 1]]


def test_neither_positions_nor_documents():
    found = summed(buckets=0, document_starts=None)
    assert found.loss == 30.0
    assert found.positions.shape == found.documents.shape == (2, 0)
    assert by_position([found], 6, 0) == []


def test_a_document_starts_with_its_own_first_token():
    assert summed(document_starts=[0, 102]).first_document == 1
    assert summed(document_starts=[0, 103]).first_document == 0


def test_sums_are_in_float64():
    """In fp32, a small loss added to a large one would be lost."""
    losses = torch.tensor([2.0**24, 1.0, 1.0])
    assert sum_window(0, losses, 0, 1, seq_len=4, buckets=1, document_starts=None).loss == 2.0**24 + 2


def test_windows_together():
    both = [summed(), summed(first_scored=101)]
    (first, second, third) = by_position(both, 6, 3)
    assert (first.start, first.end, first.tokens, first.loss) == (0, 2, 1, 1.0)
    assert (second.start, second.end, second.tokens, second.loss) == (2, 4, 4, 3.0)
    assert (third.start, third.end, third.tokens, third.loss) == (4, 6, 4, 12.0)
    assert third.perplexity == math.exp(12.0)
    documents = by_document(both, np.array([0, 50, 103, 105]))
    assert [(d.document, d.start, d.tokens, d.loss) for d in documents] == [
        (1, 50, 3, 5 / 3),
        (2, 103, 4, 6.0),
        (3, 105, 2, 16.0),
    ]


def test_perplexity_of_a_loss():
    assert perplexity_of(0.0) == 1.0
    assert perplexity_of(699.5) == math.exp(699.5)
    assert perplexity_of(700.0) == perplexity_of(800.0) == math.inf
    assert math.isnan(perplexity_of(math.nan))


def test_key_tokens_of_a_window():
    """Tokens 102, 104 and 105 of the file: positions 2, 4 and 5."""
    found = summed(key_tokens=np.array([2, 4, 5]))
    assert (found.key_loss, found.key_tokens) == (26.0, 3)
    assert (found.loss, found.tokens) == (30.0, 4)
    for none in (np.array([], dtype=np.int64), None):
        assert (summed(key_tokens=none).key_loss, summed(key_tokens=none).key_tokens) == (0.0, 0)
