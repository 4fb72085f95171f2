"""script/performance/reading.py: on a CPU with a tiny model, against stock transformers."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from component.rope import extend_context
from tests.conftest import build_llama
from tests.outcome import refused_by_us

PROGRAM = "script/performance/reading.py"


@pytest.fixture
def words(tiny_llama_config, tokenizer, tmp_path) -> list:
    extend_context(tiny_llama_config, 512)
    build_llama(tiny_llama_config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tokens = np.random.default_rng(0).integers(3, 300, 500).astype(np.uint16)
    tokens.tofile(tmp_path / "data.bin")
    files = ("--model_name_or_path", tmp_path / "base", "--data_path", tmp_path / "data.bin")
    sizes = ("--tokens", 400, "--scored", 100, "--new_tokens", 4, "--chunk", 128, "--load_in_4bit", "false")
    return [*files, *sizes, "--output_json", tmp_path / "result.json"]


def test_figures(words, run_program, tmp_path):
    outcome = run_program(PROGRAM, *words, "--caches", "dynamic", "int8", "int2")
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "result.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.from_numpy(np.fromfile(tmp_path / "data.bin", np.uint16)[:400].astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None]).logits[0, 299:399]
    expected = torch.nn.functional.cross_entropy(logits, ids[300:]).exp().item()
    assert found["reference"] == {"cache": "dynamic", "perplexity": pytest.approx(expected, rel=1e-4)}
    dynamic, int8, int2 = found["caches"]
    assert dynamic["relative_perplexity"] == pytest.approx(1, abs=1e-4)
    assert 0 < abs(int8["relative_perplexity"] - 1) < 0.01 < abs(int2["relative_perplexity"] - 1)
    for row in found["caches"]:
        assert 0 < row["seconds_to_first_token_of_second_question"] < row["seconds_total"]
        assert row["tokens_per_second"] > 0
    assert found["command"].startswith(f"python {PROGRAM}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tokens", 480), "has 500 tokens; set --tokens 468"),
        (("--tokens", 101), "--tokens: 101; use at least --scored + 2 = 102"),
        (("--chunk", 100), "--chunk: 100 tokens; use a multiple of 64"),
        (("--memory_budget_gib", 32), "--memory_budget_gib: 32.0 GiB, but there is no GPU"),
    ],
)
def test_wrong_flags(more, message, words, run_program, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused_by_us(run_program(PROGRAM, *words, *more), message)


def test_random_weights_need_a_tokenizer(run_program, tmp_path):
    outcome = run_program(PROGRAM, "--output_json", tmp_path / "result.json")
    refused_by_us(outcome, "--model_name_or_path: missing; name it, or --tokenizer and --work")
