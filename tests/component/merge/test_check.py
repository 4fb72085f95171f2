"""Does a merged model equal the adapter on its base? What is compared, on which device, and when it is skipped."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from component.error import UserError
from component.merge import check as merge_check
from component.merge.check import agreement, check_merged, fixed_ids, lengths_to_check
from component.merge.plan import MergePlan

CPU = torch.device("cpu")


@pytest.fixture
def models(tiny_llama, base_folder):
    return tiny_llama, AutoModelForCausalLM.from_pretrained(base_folder).eval()


@pytest.fixture
def plan(tiny_llama_config):
    return MergePlan(tiny_llama_config, None, torch.float16, {}, {})


def test_agreement_equals_that_of_full_logits(models, tokenizer):
    """Chunked sums compared with one plain computation; the length is not a multiple of a chunk."""
    first, second = models
    second.model.norm.weight.data[3] *= 2
    ids = fixed_ids(tokenizer, 61)
    with torch.no_grad():
        ours, theirs = first(ids).logits, second(ids).logits
    found = agreement(first, second, ids)
    assert found.tokens == 61
    assert found.largest == pytest.approx(float((ours - theirs).abs().max()), rel=1e-5)
    assert found.mean == pytest.approx(float((ours - theirs).abs().mean()), rel=1e-5)
    assert found.spread == pytest.approx(float(ours.std(correction=0)), rel=1e-5)
    assert found.same_argmax == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()))
    assert found.largest > 0.1


def test_chunks_change_nothing(models, tokenizer, monkeypatch):
    first, second = models
    second.model.norm.weight.data[3] *= 2
    ids, chunked = fixed_ids(tokenizer, 61), merge_check.chunked_logits
    expected = agreement(first, second, ids)
    monkeypatch.setattr(merge_check, "chunked_logits", lambda model, ids: chunked(model, ids, chunk=7))
    found = agreement(first, second, ids)
    assert found.mean == pytest.approx(expected.mean, rel=1e-6)
    assert found.largest == pytest.approx(expected.largest, rel=1e-5)
    assert found.same_argmax == expected.same_argmax


def test_the_text_has_the_requested_length(tokenizer):
    assert [fixed_ids(tokenizer, length).shape for length in (1, 64, 5000)] == [(1, 1), (1, 64), (1, 5000)]
    assert torch.equal(fixed_ids(tokenizer, 5000)[:, :64], fixed_ids(tokenizer, 64))


@pytest.mark.parametrize("broken", [None, 1.5, math.nan])
def test_too_large_a_difference_is_refused(models, tokenizer, plan, capsys, broken):
    first, second = models
    if broken is not None:
        second.model.layers[1].input_layernorm.weight.data *= broken
    arguments = (lambda **_: first), (lambda **_: second), tokenizer, plan, [16, 64], CPU
    if broken is None:
        assert [result.tokens for result in check_merged(*arguments)] == [16, 64]
    else:
        with pytest.raises(UserError, match=r"--check: at 16 tokens"):
            check_merged(*arguments)
    printed = capsys.readouterr().out
    assert "16 tokens" in printed
    assert "64 tokens" in printed
    assert ("differ by 0 at most" in printed) == (broken is None)


def test_without_lengths_nothing_is_loaded(tokenizer, plan):
    assert check_merged(pytest.fail, pytest.fail, tokenizer, plan, [], CPU) == []


@pytest.mark.parametrize(
    ("check", "free", "flops", "lengths", "message"),
    [
        ("auto", 1e9, 1e15, [64, 256], ""),
        ("auto", 1e3, 1e15, [], "0.0 GB are free"),
        ("auto", 1e9, 1e8, [64], "not checked at 256 tokens"),
        ("yes", 1e3, 1e8, [64, 256], ""),
        ("only", 1e3, 1e8, [64, 256], ""),
        ("no", 1e9, 1e15, [], ""),
    ],
)
def test_which_lengths_are_checked(plan, monkeypatch, capsys, check, free, flops, lengths, message):
    plan.config.rope_parameters["factor"] = 4.0
    monkeypatch.setattr(type(plan), "parameters", property(lambda self: 200_000))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(merge_check, "CPU_FLOPS_LIMIT", flops)
    assert lengths_to_check(plan, check, "--save_path MODEL") == (lengths, CPU)
    printed = capsys.readouterr().err
    assert message in printed
    assert ("--save_path MODEL --check only" in printed) == bool(message)
