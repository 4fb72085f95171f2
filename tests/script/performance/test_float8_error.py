"""script/performance/float8_error.py: with a tiny model, against stock transformers with the same NF4 weights."""

import argparse
import json

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora import LoraLayer

from script.performance import float8_error
from script.performance.float8_error import cases_of, load_adapted, read_rows, train_pass, use_case
from tests.conftest import TEXTS, build_llama
from tests.outcome import refused_by_us

PROGRAM = "script/performance/float8_error.py"
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def words(base_folder, tmp_path) -> list:
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text * 3}) + "\n" for text in TEXTS))
    files = ("--model_name_or_path", base_folder, "--data_path", data, "--output_json", tmp_path / "found.json")
    return [*files, "--max_seq_length", 32, "--rows", 2, "--lora_rank", 4, "--lora_b_std", 0.05]


@pytest.fixture
def flags(words, own_cache) -> argparse.Namespace:
    values = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    values |= {"model_name_or_path": str(values["model_name_or_path"]), "data_path": str(values["data_path"])}
    return argparse.Namespace(**values, lora_alpha=16, steps=[0], each_kind=False)


def dequantized(layer: torch.nn.Module) -> torch.Tensor:
    state = layer.weight.quant_state
    return bnb.functional.dequantize_4bit(layer.weight.data, state).float()


@torch.no_grad()
def test_exact_losses(flags, tiny_llama_config):
    """In fp32 as stock transformers' with LoRA added to the weights, before and after a pass in bf16."""
    model, products = load_adapted(flags, torch.device("cpu"))
    base = model.get_base_model()
    (batch, _), _ = read_rows(flags, base.config.vocab_size)
    cases = {"exact": float8_error.Case(torch.float32, ()), **cases_of(products, False)}
    base.config.group_size = float8_error.UNLIMITED
    found = {}
    for name in ("exact", "bf16", "fp8_in_fp32", "again"):
        case = cases.get(name, cases["exact"])
        use_case(model, products, case)
        with torch.enable_grad():
            found[name] = train_pass(model, batch, case.dtype)[0]
    plain = build_llama(tiny_llama_config)
    weights = {name: value.float() for name, value in base.state_dict().items() if ".lora_" not in name}
    for path, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            weights[f"{path}.weight"] = dequantized(layer.get_base_layer()) + layer.get_delta_weight("default")
    names = plain.state_dict().keys()
    plain.load_state_dict({name: weights[name] for name in names})
    expected = plain(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    assert found["exact"] == found["again"] == pytest.approx(expected, rel=1e-5)
    assert 1e-5 < abs(found["bf16"] / expected - 1) < 0.01
    assert 1e-5 < abs(found["fp8_in_fp32"] / expected - 1) < 0.05


def test_results(words, run_program, tmp_path):
    figure = tmp_path / "found.png"
    outcome = run_program(PROGRAM, *words, "--steps", 2, 0, "--each_kind", "--figure", figure)
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "found.json").read_text())["measurements"]
    states = [(0, "shift_short"), (0, "full"), (2, "shift_short"), (2, "full")]
    assert [(each["steps"], each["attention"]) for each in found] == states
    assert len({tuple(each["losses"]) for each in found}) == 4, "steps and attention change the losses"
    for each in found:
        cases = each["cases"]
        assert list(cases) == ["bf16", "fp8", "fp8_in_fp32", "fp8_backward", *(f"fp8_only_{kind}" for kind in KINDS)]
        for name, case in cases.items():
            is_alone = name.startswith("fp8_only_")
            assert len(case["losses"]) == (1 if is_alone else 2)
            assert list(case["by_layer"]) == ["0", "1"]
            assert list(case["by_projection"]) == KINDS
            # one product errs by 0.002 in bf16 and by 0.03 in FP8
            assert 0.001 < case["total"]["relative_error"] < (0.05 if name == "bf16" else 0.5)
            assert case["total"]["cosine"] > 0.9
        assert 4 < cases["fp8"]["total"]["relative_error"] / cases["bf16"]["total"]["relative_error"] < 64
        alone = [case["total"]["relative_error"] for name, case in cases.items() if name.startswith("fp8_only_")]
        assert max(alone) < cases["fp8_in_fp32"]["total"]["relative_error"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    refused_by_us(run_program(PROGRAM, *words), "found.json exists; name another file, or replace it with --overwrite")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lora_b_std", 0), "--lora_b_std: 0.0; use a number above 0"),
        (("--steps", 4, -1), "--steps: -1; use at least 0"),
        (("--rows", 1000), "--rows: 1000, and 0 steps, but "),
    ],
)
def test_wrong_flags(more, message, words, run_program):
    refused_by_us(run_program(PROGRAM, *words, *more), message)
