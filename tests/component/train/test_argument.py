"""What a user can set: --help, and the values of a YAML with those of the command line, before any check."""

import dataclasses
import io
import logging
import subprocess
import sys
import time
import warnings

import pytest
from transformers import TrainingArguments

from component.error import UserError
from component.train.argument import LongQLoRAArguments, read_command_line, trainer_keys
from tests.conftest import ROOT


def test_help_lists_every_key_of_ours(capsys):
    with pytest.raises(SystemExit) as end:
        read_command_line(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for item in dataclasses.fields(LongQLoRAArguments):
        assert item.name in text


def test_quiet_is_no_override(tmp_path, monkeypatch):
    """And from there on, nothing but errors reaches standard error."""
    file, errors = tmp_path / "run.yaml", io.StringIO()
    file.write_text("sft: true\n")
    monkeypatch.setattr(sys, "stderr", errors)
    try:
        with warnings.catch_warnings():
            words = ["--quiet", "--train_args_file", str(file), "--packing", "true"]
            assert read_command_line(words) == (str(file), {"sft": True, "packing": True})
            print("50 %", file=sys.stderr)
            warnings.warn("deprecated", stacklevel=1)
    finally:
        logging.disable(logging.NOTSET)
    assert errors.getvalue() == ""


def test_the_command_line_overrides_the_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("sft: true\nlearning_rate: 1e-4\n")
    words = ["--train_args_file", str(file), "--learning_rate", "2e-5", "--packing=true"]
    assert read_command_line(words) == (str(file), {"sft": True, "learning_rate": 2e-5, "packing": True})


def test_the_keys_of_the_trainer_are_those_of_its_class():
    assert trainer_keys() == {field.name for field in dataclasses.fields(TrainingArguments)}


WRONG = {
    "missing": (["--train_args_file", "missing.yaml"], "there is no file missing.yaml"),
    "no YAML": (["--train_args_file", "bad.yaml"], "bad.yaml is not YAML"),
    "twice": (["--train_args_file", "twice.yaml"], "seed is set twice"),
    "no lines": (["--train_args_file", "list.yaml"], "holds no 'key: value' lines"),
    "folder": (["--train_args_file", "."], "there is no file ."),
    "not UTF-8": (["--train_args_file", "latin.yaml"], "latin.yaml is not YAML"),
    "unknown flag": (
        ["--train_args_file", "good.yaml", "--lora_rnak", "8"],
        "--lora_rnak 8: unknown key (did you mean lora_rank",
    ),
    "no value": (["--train_args_file", "good.yaml", "--seed"], "--seed: no value"),
}


@pytest.mark.parametrize("name", WRONG)
def test_k21_a_wrong_file_is_told_before_slow_imports(name, tmp_path):
    """torch alone takes 3 s on two busy cores."""
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "good.yaml").write_text("seed: 1\n")
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9\n")
    words, message = WRONG[name]
    command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), *words]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert time.monotonic() - begin < 10
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert not {"torch", "transformers"} & {line.rsplit("|", 1)[1].strip() for line in lines if line.count("|") == 2}
    assert [line for line in lines if line.startswith("error: ") and message in line], done.stderr[-2000:]
    with pytest.raises(UserError):  # it is the flags' own error, not one of the imports
        read_command_line([word if word.startswith("-") else str(tmp_path / word) for word in words])
