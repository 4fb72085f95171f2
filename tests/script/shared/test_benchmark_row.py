"""Rows of a benchmark: names, groups, settings, and which are refused."""

from dataclasses import fields

import pytest
from transformers import TrainingArguments

from component.error import UserError
from component.train.argument import LongQLoRAArguments
from script.shared.benchmark_row import OURS, Row, is_done


def test_overrides_of_baselines():
    assert Row("7b", 8192, "hf", overrides={"memory_budget_gib": 32}).name == "7b-8192-hf-memory_budget_gib=32"
    with pytest.raises(UserError, match="memory_budget_gib alone"):
        Row("7b", 8192, "hf", overrides={"keep_layers": 3})


def test_groups_of_each_kind():
    assert Row("7b", 8192, "unsloth").group is None
    assert Row("7b", 8192, "original").group == 2048
    assert Row("7b", 8192, "ours_fastest").group == 2048
    assert Row("7b", 8192, "ours_fastest", overrides={"group_size": 512}).group == 512
    assert Row("7b", 8192, "ours_fastest", overrides={"use_shift_short_attention": False}).group is None


def test_resume_skips_measured_rows_and_retries_failed_ones():
    row = Row("7b", 8192, "unsloth")
    done = {"size": "7b", "length": 8192, "kind": "unsloth", "overrides": {}}
    assert is_done(row, [done])
    assert is_done(row, [done | {"error": "torch.OutOfMemoryError: CUDA out of memory."}])
    assert not is_done(row, [done | {"error": "ModuleNotFoundError: No module named 'unsloth'"}])
    assert not is_done(row, [done | {"length": 4096}, done | {"kind": "hf"}, done | {"size": "13b"}])
    assert not is_done(row, [done | {"overrides": {"memory_budget_gib": 32}}])


def test_settings_are_keys_of_the_yaml():
    known = {item.name for item in (*fields(LongQLoRAArguments), *fields(TrainingArguments))}
    assert {name for settings in OURS.values() for name in settings} <= known


@pytest.mark.parametrize(
    ("cards", "overrides", "named"),
    [
        (0, {}, "cards: 0; use a number of at least 1"),
        ("2", {}, "cards: '2'; use a number"),
        (1, {"sequence_parallel_size": 2}, "cards: 1; use a number of at least 1 and of sequence_parallel_size"),
        (3, {"sequence_parallel_size": 2}, "cards: 3; use a multiple of sequence_parallel_size, 2"),
    ],
)
def test_impossible_numbers_of_cards(cards, overrides, named):
    with pytest.raises(UserError, match=named):
        Row("7b", 8192, "ours_fastest", 0, overrides, cards)


def test_baselines_run_on_one_card():
    with pytest.raises(UserError, match="cards: 2; unsloth runs on one"):
        Row("7b", 8192, "unsloth", cards=2)


def test_fp8_differs_from_fastest_in_its_products_alone():
    for kind in ("fp8", "fp8_backward"):
        assert OURS[kind] == OURS["fastest"] | {"frozen_matmul": kind}
