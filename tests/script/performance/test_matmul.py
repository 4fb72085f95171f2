"""script/performance/matmul.py: on a CPU with tiny shapes, and the error it reports."""

import json

import pytest
import torch

from script.performance.matmul import layers_of, measure, nf4_layer
from script.shared.shape import SHAPES
from tests.outcome import refused_by_us

PROGRAM = "script/performance/matmul.py"


def test_rows(run_program, tmp_path):
    file = tmp_path / "found.json"
    outcome = run_program(
        PROGRAM, "--sizes", "tiny", "tiny-qwen2", "--tokens", 5, 32, "--runs", 2, "--output_json", file
    )
    assert outcome.status == 0, outcome.err
    rows = json.loads(file.read_text())["rows"]
    layers = ["q_proj", "gate_proj", "down_proj", "q_proj", "k_proj", "gate_proj", "down_proj"]
    assert [row["layer"] for row in rows[::4]] == layers
    assert {(row["tokens"], row["product"]) for row in rows} == {
        (tokens, product) for tokens in (5, 32) for product in ("forward", "input gradient")
    }
    for row in rows:
        assert row["bf16"] == pytest.approx(row["dequantize"] + row["bf16_product"], abs=1e-3)
        parts = row["quantize_activation"] + row["quantize_weight"] + row["fp8_product"]
        assert row["fp8"] == pytest.approx(parts, abs=1e-3)
        assert min(row["bf16"], row["fp8_product_exact_sums"]) > 0


@pytest.mark.parametrize("backward", [False, True])
def test_the_error_is_that_of_rounding(backward):
    """2^-4 sqrt(2 / 3) at most; numbers spread evenly between powers of two have about 2.6 % each."""
    torch.manual_seed(0)
    layer = nf4_layer(256, 192, torch.device("cpu"))
    x = torch.randn(64, 192 if backward else 256, dtype=torch.bfloat16)
    assert 0.025 < measure(layer, x, backward, 1)["fp8_error"] < 2**-4 * (2 / 3) ** 0.5


def test_layers_of_7b():
    assert layers_of(SHAPES["7b"]) == {
        "q_proj": (4096, 4096),
        "gate_proj": (4096, 11008),
        "down_proj": (11008, 4096),
    }


@pytest.mark.parametrize(("flag", "value", "words"), [("--tokens", 0, "--tokens: 0; use"), ("--runs", 0, "--runs: 0")])
def test_wrong_flags(flag, value, words, run_program, tmp_path):
    refused_by_us(run_program(PROGRAM, flag, value, "--output_json", tmp_path / "found.json"), words)
