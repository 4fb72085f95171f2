"""Token-weighted loss and perplexity."""

import math

import pytest
import torch
from transformers import EvalPrediction

from component.train.trainer import token_weighted_loss


def test_tokens_have_equal_weight():
    """10 nats over 10 tokens and 30 over 2: 40 / 12 nats per token, not (1 + 15) / 2."""
    found = token_weighted_loss(
        EvalPrediction(predictions=torch.tensor([10.0, 30.0]), label_ids=torch.tensor([10, 2]))
    )
    assert found == pytest.approx({"loss": 40 / 12, "perplexity": math.exp(40 / 12)})


def test_a_single_token():
    found = token_weighted_loss(EvalPrediction(predictions=torch.tensor([3.0]), label_ids=torch.tensor([1])))
    assert found == pytest.approx({"loss": 3.0, "perplexity": math.exp(3.0)})


def test_perplexity_does_not_overflow():
    found = token_weighted_loss(EvalPrediction(predictions=torch.tensor([1e6]), label_ids=torch.tensor([10])))
    assert found["loss"] == pytest.approx(1e5)
    assert found["perplexity"] > 1e300
    empty = token_weighted_loss(EvalPrediction(predictions=torch.tensor([0.0]), label_ids=torch.tensor([0])))
    assert empty == {"loss": 0.0, "perplexity": 1.0}
