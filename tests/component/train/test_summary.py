"""The summary that a run prints before its first step."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from component.adapter import add_adapter
from component.train.summary import (
    aligned,
    checkpoint_count,
    describe_cost,
    describe_trainable,
    steps_per_epoch,
    total_steps,
)
from tests.reference.llama2_7b import LLAMA2_7B


def test_summary_is_aligned():
    assert aligned({"model": "a base", "context": "64 -> 128"}) == "  model    a base\n  context  64 -> 128"


def test_describe_trainable(tiny_llama):
    model = add_adapter(tiny_llama, rank=4, alpha=16, dropout=0.0, train_embedding=True, train_norm=True)
    assert describe_trainable(model) == "28,832 parameters (LoRA 4,096, embeddings 24,576, norms 160)"


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"num_train_epochs": 2}, 26),
        ({"num_train_epochs": 0.1}, 2),
        ({"num_train_epochs": 2, "dataloader_drop_last": True}, 24),  # the last 4 samples of 8
        ({"num_train_epochs": 2, "dataloader_drop_last": True, "gradient_accumulation_steps": 4}, 26),  # 50 of 2
    ],
)
def test_steps_of_a_run(values, steps, tmp_path):
    """100 samples, 8 in each step."""
    trainer = SimpleNamespace(train_dataset=range(100), get_total_train_batch_size=lambda args: 8)
    assert total_steps(TrainingArguments(tmp_path, use_cpu=True, **values), trainer) == steps


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_steps": 50, "save_total_limit": 3}, 4),  # a new one is written before the oldest is removed
        ({"save_steps": 300}, 4),  # after 300, 600, 900 and 1000 steps
        ({"save_steps": 5000, "save_total_limit": 3}, 1),
        ({"save_steps": 0.25, "save_total_limit": 9}, 4),
        ({"save_strategy": "epoch"}, 4),  # of 300 steps, whatever num_train_epochs is
        ({"save_strategy": "epoch", "save_total_limit": 1}, 2),
        ({"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 100}, 10),
        ({"save_strategy": "best", "eval_strategy": "epoch", "save_total_limit": 2}, 3),
        (
            {"save_strategy": "best", "eval_strategy": "epoch", "save_total_limit": 1},
            3,
        ),  # the best, the last, a new one
    ],
)
def test_checkpoints_on_disk(values, count, tmp_path):
    assert checkpoint_count(TrainingArguments(tmp_path, use_cpu=True, **values), 1000, 300) == count


def test_checkpoints_of_a_stream(tmp_path):
    trainer = SimpleNamespace(train_dataset=iter(range(9)), get_total_train_batch_size=lambda args: 8)
    training_args = TrainingArguments(tmp_path, use_cpu=True, max_steps=100, save_steps=40)
    assert steps_per_epoch(training_args, trainer) is None
    assert checkpoint_count(training_args, total_steps(training_args, trainer), None) == 3


@pytest.mark.parametrize(("only_model", "each"), [(False, 3), (True, 1)])
def test_disk_of_the_checkpoints(only_model, each, tmp_path):
    """2**28 parameters in fp32, with two moments or without."""
    work = replace(LLAMA2_7B, trained=2**28, zero=False, optimizer="adamw_torch")
    words = {"max_steps": 100, "save_steps": 50, "save_only_model": only_model}
    training_args = TrainingArguments(tmp_path, use_cpu=True, **words)
    trainer = SimpleNamespace(train_dataset=range(100), get_total_train_batch_size=lambda args: 8)
    lines, expected = describe_cost(None, training_args, trainer, work, None)
    assert expected == {}
    assert lines == {"disk": f"up to {2 * each:g} GiB: 2 checkpoints of {each:g} GiB at the same time"}
    training_args.save_steps = 100
    lines, _ = describe_cost(None, training_args, trainer, work, None)
    assert lines == {"disk": f"up to {each:g} GiB: one checkpoint"}
