"""compare_caches.py: its table and its JSON."""

import json

import numpy as np
import pytest
from transformers import MistralConfig

from tests.conftest import build_llama
from tests.outcome import refused

COMPARE = "script/evaluate/compare_caches.py"


@pytest.fixture
def compare(run_program, tiny_llama_config, tmp_path):
    tiny_llama_config.head_dim = 16  # 2 heads of 8 values cannot be quantized to 2 bits
    build_llama(tiny_llama_config).save_pretrained(tmp_path / "model")
    np.arange(5, 205, dtype=np.uint16).tofile(tmp_path / "t.bin")
    words = ("--model_name_or_path", tmp_path / "model", "--data_path", tmp_path / "t.bin", "--windows", 1)
    return lambda *more: run_program(COMPARE, *words, *more)


def test_a_table_and_a_file(compare, tmp_path):
    outcome = compare("--seq_len", 140, "--output_json", tmp_path / "out.json")
    assert outcome.status == 0, outcome.err
    rows = [line.split()[0] for line in outcome.out.splitlines()]
    assert rows == ["cache", "dynamic", "fp8", "int8", "int4", "int2"]
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["seq_len"], record["dtype"]) == (140, "float32")
    assert record["command"].startswith(f"python {COMPARE} --model_name_or_path")
    assert [row["cache"] for row in record["caches"]] == rows[1:]
    changes = [row["logit_change"] for row in record["caches"]]
    assert changes[0] == 0
    assert min(changes[1:]) > 0, "all others were quantized"


def test_too_long_a_window(compare):
    refused(compare("--seq_len", 300), "--seq_len", "200 tokens", "300")


def test_a_window_in_which_nothing_is_quantized(compare):
    refused(compare("--seq_len", 127), "--seq_len", "127", "128")


def test_a_model_with_a_sliding_window_is_refused_before_it_is_loaded(run_program, tmp_path):
    MistralConfig(sliding_window=32, num_hidden_layers=1).save_pretrained(tmp_path / "model")  # without weights
    np.arange(5, 205, dtype=np.uint16).tofile(tmp_path / "t.bin")
    words = ("--model_name_or_path", tmp_path / "model", "--data_path", tmp_path / "t.bin", "--seq_len", 128)
    refused(run_program(COMPARE, *words), "--model_name_or_path", "mistral", "every token")
