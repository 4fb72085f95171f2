"""What an earlier version wrote is read: its killed run resumes, its adapter merges, its tokens are measured.

    python -m pytest tests/end_to_end/test_earlier_version.py

tests/reference/earlier_version/ was written by commit 70e2acc, on the CPU: `base`, the tiny Llama of the tests;
`killed`, the run of run.yaml as it was after its third step of six; `adapter`, what that run left when it was not
killed; `tokens.bin`. expected.json holds the losses of the whole run, the evaluation's loss, and the merged model's
config and, of each tensor, the sum and the sum of absolute values.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = ROOT / "tests/reference/earlier_version"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())


def test_a_killed_run_resumes_with_equal_losses(tmp_path):
    """With dropout 0.1: the random numbers go on where they were."""
    shutil.copytree(WRITTEN / "killed", tmp_path / "run")
    values = yaml.safe_load((WRITTEN / "run.yaml").read_text())
    changed = {"model_name_or_path": str(WRITTEN / "base"), "train_file": str(WRITTEN / "train.jsonl")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, **changed, "resume_from_checkpoint": "auto"}))
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--train_args_file", "run.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    history = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    losses = {str(row["step"]): row["loss"] for row in history if "loss" in row}
    assert losses == pytest.approx(EXPECTED["losses"], abs=1e-5)
    record = json.loads((tmp_path / "run/longqlora.json").read_text())
    assert (record["steps"], record["trained_tokens"]) == (6, EXPECTED["trained_tokens"])
    trained = load_file(tmp_path / "run/adapter_model.safetensors")
    before = load_file(WRITTEN / "killed/checkpoint-3/adapter_model.safetensors")
    wanted = load_file(WRITTEN / "adapter/adapter_model.safetensors")
    assert trained.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert float((trained[name] - tensor).abs().max()) <= 1e-5, name
    assert max(float((before[name] - tensor).abs().max()) for name, tensor in wanted.items()) > 1e-3


def test_its_adapter_merges_to_the_same_model(run_program, tmp_path):
    words = ["--model_name_or_path", WRITTEN / "base", "--adapter_name_or_path", WRITTEN / "adapter"]
    outcome = run_program("script/merge_lora.py", *words, "--save_path", tmp_path / "merged", "--dtype", "float32")
    assert outcome.status == 0, outcome.err
    config = json.loads((tmp_path / "merged/config.json").read_text())
    for key in ("rope_theta", "rope_scaling"):  # written since, for transformers 4
        del config[key]
    assert config == EXPECTED["merged_config"]
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == EXPECTED["merged_sums"].keys()
    for name, tensor in merged.items():
        sums = [float(tensor.double().sum()), float(tensor.double().abs().sum())]
        assert sums == pytest.approx(EXPECTED["merged_sums"][name], rel=1e-5, abs=1e-5), name


def test_its_tokens_and_adapter_are_measured_alike(run_program, tmp_path):
    words = ["--base_model", WRITTEN / "base", "--peft_model", WRITTEN / "adapter", "--seq_len", 64]
    file = tmp_path / "found.json"
    outcome = run_program(
        "script/evaluate/evaluate.py", *words, "--data_path", WRITTEN / "tokens.bin", "--output_json", file
    )
    assert outcome.status == 0, outcome.err
    assert "not checked" not in outcome.out + outcome.err  # the index knows the tokenizer
    assert json.loads(file.read_text())["results"][0]["loss"] == pytest.approx(EXPECTED["evaluation_loss"], abs=1e-5)
