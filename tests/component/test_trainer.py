"""Losses by row, perplexity by the token, and what a run says before it starts."""

import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import EvalPrediction

from component.adapter import add_adapter
from component.trainer import (
    describe_optimizer,
    describe_trainable,
    row_losses,
    stand_alone_environment,
    summary,
    token_weighted_loss,
)

TRAIN_ARGS = "train_args/deepspeed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_at_once", [1, 4, 7, 1000])
@pytest.mark.parametrize("length", [2, 8, 13])
def test_row_losses_equal_cross_entropy(dtype, rows_at_once, length):
    """In fp32 whatever the logits come in, however they are cut, with prompts and padding left out."""
    logits = (3 * torch.randn(3, length, 50)).to(dtype)
    labels = torch.randint(50, (3, length))
    labels[0, : length // 2] = -100
    labels[1, -(length // 3) - 1 :] = -100
    expected = torch.stack(
        [
            F.cross_entropy(logits[row, :-1].float(), labels[row, 1:], reduction="sum", ignore_index=-100)
            for row in range(3)
        ]
    )
    found = row_losses(logits, labels, rows_at_once=rows_at_once)
    assert found.shape == (3,)
    assert found.dtype == torch.float32
    assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_row_losses_of_rows_without_labels():
    losses = row_losses(torch.randn(2, 6, 50), torch.full((2, 6), -100))
    assert losses.tolist() == [0.0, 0.0]
    assert row_losses(torch.randn(2, 1, 50), torch.zeros(2, 1, dtype=torch.long)).tolist() == [0.0, 0.0]


def test_the_first_label_is_of_no_token_before_it():
    """Nothing predicts it."""
    logits, labels = torch.randn(1, 6, 50), torch.randint(50, (1, 6))
    masked = labels.clone()
    masked[0, 0] = -100
    assert_close(row_losses(logits, labels), row_losses(logits, masked))


def test_tokens_weigh_alike():
    """10 nats over 10 tokens and 30 over 2 are 40 / 12 nats a token, not (1 + 15) / 2."""
    found = token_weighted_loss(
        EvalPrediction(predictions=torch.tensor([10.0, 30.0]), label_ids=torch.tensor([10, 2]))
    )
    assert found == pytest.approx({"loss": 40 / 12, "perplexity": math.exp(40 / 12)})


def test_hopeless_models_have_a_perplexity_too():
    found = token_weighted_loss(EvalPrediction(predictions=torch.tensor([1e6]), label_ids=torch.tensor([10])))
    assert found["loss"] == pytest.approx(1e5)
    assert found["perplexity"] > 1e300
    empty = token_weighted_loss(EvalPrediction(predictions=torch.tensor([0.0]), label_ids=torch.tensor([0])))
    assert empty == {"loss": 0.0, "perplexity": 1.0}


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)


def test_a_run_without_launcher_is_the_only_one(no_launcher):
    stand_alone_environment()
    assert {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
    }  # fmt: skip
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 <= int(os.environ["MASTER_PORT"]) < 65536


def test_a_launcher_is_obeyed(no_launcher, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    stand_alone_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("3", "4")
    assert "MASTER_PORT" not in os.environ


def test_summary_is_aligned():
    assert summary({"model": "a base", "context": "64 -> 128"}) == "  model    a base\n  context  64 -> 128"


def test_describe_trainable(tiny_llama):
    model = add_adapter(tiny_llama, rank=4, alpha=16, dropout=0.0, train_embedding=True, train_norm=True)
    assert describe_trainable(model) == "28,832 parameters (LoRA 4,096, embeddings 24,576, norms 160)"


@pytest.mark.parametrize(
    ("file", "has", "has_not"),
    [
        (None, ["paged_adamw_32bit"], ["ZeRO", "CPU Adam"]),
        ("deepspeed_config_s2.json", ["ZeRO-2", "CPU Adam", "paged_adamw_32bit", "offload"], ["ignored"]),
        ("deepspeed_config_s2_no_offload.json", ["ZeRO-2", "paged_adamw_32bit"], ["CPU Adam", "ignored"]),
        ("deepspeed_config_s3.json", ["ZeRO-3", "paged_adamw_32bit"], ["CPU Adam", "ignored"]),
    ],
)
def test_the_optimizer_that_will_really_run(pytestconfig, file, has, has_not):
    """accelerate replaces the YAML's by DeepSpeed's CPU Adam where the ZeRO file offloads the optimizer."""
    config = file and str(pytestconfig.rootpath / TRAIN_ARGS / file)
    text = describe_optimizer("paged_adamw_32bit", config, 0.3)
    assert all(fragment in text for fragment in has), text
    assert not any(fragment in text for fragment in has_not), text
    if config:
        with open(config) as stream:  # noqa: PTH123
            assert describe_optimizer("paged_adamw_32bit", json.load(stream), 0.3) == text


def test_a_clipping_that_will_not_happen_is_told():
    assert "max_grad_norm 0.3" in describe_optimizer("adamw_torch", {"zero_optimization": {"stage": 2}}, 0.3)
    assert "max_grad_norm" not in describe_optimizer("adamw_torch", {"zero_optimization": {"stage": 2}}, 0.0)
