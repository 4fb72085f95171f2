"""passkey.py and passkey_model.py: the measurement sees success and failure.

python -m pytest tests/script/evaluate/test_passkey.py -m slow     # trains for a minute
"""

import json

import pytest

from component.storage.atomic import atomic_folder
from tests.processes import torchrun

PASSKEY, MODEL = "script/evaluate/passkey.py", "script/evaluate/passkey_model.py"


def test_results(run_program, tmp_path, adapter_folder):
    words = ["--lengths", 330, 310, "--depths", 3, "--trials", 2, "--seed", 1, "--peft_model", adapter_folder]
    files = ["--output_json", tmp_path / "passkey.json", "--figure", tmp_path / "passkey.png"]
    outcome = run_program(PASSKEY, *words, *files)
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "passkey.json").read_text())
    assert (found["lengths"], found["depths"], found["trials_each"]) == ([310, 330], [0.0, 0.5, 1.0], 2)
    assert found["accuracy"] == [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert (found["rope_factor"], found["context_tokens"], found["decoding"]) == (2.0, 128, "greedy")
    assert len(found["trials"]) == 12
    assert {key: type(value).__name__ for key, value in found["trials"][0].items()} == {
        "length": "int",
        "depth": "float",
        "trial": "int",
        "prompt_tokens": "int",
        "needle_start": "int",
        "expected": "str",
        "answered": "str",
        "is_right": "bool",
    }
    assert {"command", "hardware", "date", "versions"} <= found.keys()
    assert (tmp_path / "passkey.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert outcome.out.splitlines()[-4].split()[-2:] == ["310", "330"]
    assert outcome.out.splitlines()[-1].split() == ["100", "%", "0", "%", "0", "%"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--base_model", "missing"]),
        (["--base_model", "/no/such"], ["base_model", "/no/such"]),
        (["--base_model", "{base}", "--lengths", "0"], ["--lengths", "0", "at least 1"]),
        (["--base_model", "{base}", "--lengths", "12"], ["--lengths", "12", "at least"]),
        (["--base_model", "{base}", "--context_size", "-1"], ["--context_size", "-1", "at least 1"]),
        (["--base_model", "{base}", "--trials", "0"], ["--trials", "0", "at least 1"]),
        (["--base_model", "{base}", "--depths", "0.5", "1.5"], ["--depths", "1.5", "0 to 1"]),
        (["--base_model", "{base}", "--depths", "2.5"], ["--depths", "2.5", "whole number"]),
        (
            ["--base_model", "{base}", "--figure", "{base}/config.json/f"],
            ["--figure", "config.json/f can't be written"],
        ),
        (["--base_model", "{base}", "--output_json", "{base}"], ["--output_json", "is a folder"]),
    ],
)
def test_mistakes(words, parts, run_program, base_folder):
    outcome = run_program(PASSKEY, *(word.format(base=base_folder) for word in words))
    assert outcome.status == 1
    assert all(part in outcome.err for part in parts), outcome.err
    assert "Loading weights" not in outcome.err, "before anything is loaded"


def test_k7_one_file_for_two_results(run_program, tmp_path, base_folder):
    files = ["--output_json", tmp_path / "same", "--figure", tmp_path / "same"]
    outcome = run_program(PASSKEY, "--base_model", base_folder, *files)
    assert outcome.status == 1
    assert "--figure: " in outcome.err
    assert "is written by --output_json too" in outcome.err
    assert not (tmp_path / "same").exists()


def test_k8_a_folder_is_held_while_its_model_is_trained(run_program, tmp_path):
    with atomic_folder(tmp_path / "model"):
        outcome = run_program(MODEL, "--output", tmp_path / "model", "--length", 96, "--steps", 10**6)
    assert outcome.status == 1
    assert "another process is writing it" in outcome.err


def test_a_list_of_depths(run_program, tmp_path, base_folder):
    words = ["--base_model", base_folder, "--lengths", 310, "--depths", 0.9, 0.25, "--trials", 1]
    outcome = run_program(PASSKEY, *words, "--output_json", tmp_path / "p.json")
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "p.json").read_text())["depths"] == [0.25, 0.9]


@pytest.mark.slow
def test_success_within_the_trained_length_and_failure_beyond(run_program, tmp_path):
    """With a smaller version of the model in figure/passkey.png."""
    size = ["--length", 96, "--steps", 260, "--tokens_per_step", 3072]
    trained = run_program(MODEL, "--output", tmp_path / "model", *size)
    assert trained.status == 0, trained.err
    words = ["--base_model", tmp_path / "model", "--lengths", 66, 80, 96, 1024, "--depths", 0, 0.5, "--trials", 4]
    outcome = run_program(PASSKEY, *words, "--output_json", tmp_path / "p.json")
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "p.json").read_text())
    assert [row[:3] for row in found["accuracy"]] == [[1.0, 1.0, 1.0]] * 2
    assert sum(row[3] for row in found["accuracy"]) / 2 < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_several_processes_give_the_same_answers(run_program, tmp_path, adapter_folder, parts):
    """Prompts shared out, or each prompt shared by two processes."""
    words = ["--lengths", "330", "310", "--depths", "3", "--trials", "2", "--peft_model", str(adapter_folder)]
    assert run_program(PASSKEY, *words, "--output_json", tmp_path / "one.json").status == 0
    torchrun(PASSKEY, 2, *words, "--sequence_parallel_size", parts, "--output_json", tmp_path / "two.json")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["trials"] == one["trials"]
    assert two["accuracy"] == one["accuracy"]
