"""The memory plan of a run, and in which precision it multiplies, on a GPU whose answers are written here."""

import math

import pytest
from transformers import LlamaConfig, TrainingArguments

from component.distributed.strategy import Strategy
from component.train import model_check, planning
from component.train.argument import LongQLoRAArguments
from component.train.planning import plan_memory

LLAMA2_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """plan(tokens, budget in GiB, recorded) on a GPU that multiplies FP8."""

    def make(tokens: int, gib: float, recorded: str | None = None, **keys):
        monkeypatch.setattr(model_check, "is_fast", lambda hidden, device: True)
        monkeypatch.setattr(planning, "available_memory", lambda *_: (gib, math.inf))
        args = LongQLoRAArguments("model", "a.jsonl", False, tokens, tokens, **keys)
        settings = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True, report_to="none")
        return plan_memory(args, settings, Strategy(), LLAMA2_7B, recorded)

    return make


def test_fp8_for_gradients_where_the_gpu_has_it(plan):
    args, memory = plan(8192, 30.0)
    assert args.frozen_matmul == "fp8_backward"
    assert memory.work.in_float8
    assert not memory.work.float8_forward
    assert memory.fits


def test_unquantized_where_only_that_fits(plan):
    kinds = ("unquantized", "fp8_backward")
    least = [plan(177152, 1.0, frozen_matmul=kind)[1].expected.peak_gib for kind in kinds]
    gib = sum(least) / 2
    assert least[0] < gib < least[1]
    args, memory = plan(177152, gib)
    assert args.frozen_matmul == "unquantized"
    assert not memory.work.in_float8
    assert memory.fits
    asked, memory = plan(177152, gib, frozen_matmul="fp8_backward")
    assert asked.frozen_matmul == "fp8_backward"
    assert not memory.fits
    assert "to save memory: frozen_matmul: unquantized" in memory.line


@pytest.mark.parametrize("recorded", ["unquantized", "fp8"])
def test_a_resumed_run_goes_on_as_it_was(plan, recorded):
    args, memory = plan(8192, 30.0, recorded)
    assert args.frozen_matmul == recorded
    assert memory.work.in_float8 == memory.work.float8_forward == (recorded == "fp8")
