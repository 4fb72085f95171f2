"""script/benchmark.py: requested rows, resuming, commands; and tiny rows end to end (slow)."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from component.error import UserError
from script.benchmark import KINDS, Row, cards, command_of, make_rows, requested_rows
from tests.conftest import ROOT
from tests.outcome import refused_by_us


def flags(**given) -> argparse.Namespace:
    defaults = {"sizes": [], "lengths": [], "kinds": [], "row": [], "plan": None}
    return argparse.Namespace(**{**defaults, **given})


def test_rows_are_requested_in_three_ways(tmp_path):
    plan = tmp_path / "rows.json"
    row = {"size": "13b", "length": 8192, "kind": "hf", "overrides": {"memory_budget_gib": 32}}
    plan.write_text(json.dumps([row]))
    rows = requested_rows(
        flags(
            sizes=["7b"],
            lengths=[8192, 131072],
            kinds=["hf", "unsloth"],
            row=["tiny:256:ours_off:2", "qwen2.5-7b:8192:hf"],
            plan=plan,
        )
    )
    assert [(row.size, row.length, row.kind, row.steps) for row in rows] == [
        ("7b", 8192, "hf", 4),
        ("7b", 8192, "unsloth", 4),
        ("7b", 131072, "hf", 3),
        ("7b", 131072, "unsloth", 3),
        ("tiny", 256, "ours_off", 2),
        ("qwen2.5-7b", 8192, "hf", 4),
        ("13b", 8192, "hf", 4),
    ]
    assert rows[-1].overrides == {"memory_budget_gib": 32}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "no rows"),
        ({"row": ["7b:8192"]}, "--row: '7b:8192'"),
        ({"row": ["7b:long:hf"]}, "--row: '7b:long:hf'"),
        ({"row": ["70b:8192:hf"]}, "size: '70b'"),
        ({"row": ["7b:8192:unslot"]}, "did you mean unsloth"),
        ({"plan": Path("nowhere.json")}, "--plan: there is no file nowhere.json"),
    ],
)
def test_wrong_rows_are_named(given, named):
    with pytest.raises(UserError, match=named):
        requested_rows(flags(**given))


@pytest.mark.parametrize("entry", [{"size": "7b", "length": 1}, {"size": "7b", "length": 1, "kind": "hf", "x": 1}])
def test_wrong_plans_are_named(tmp_path, entry):
    (tmp_path / "plan.yaml").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=r"--plan: .*needs size, length and kind"):
        requested_rows(flags(plan=tmp_path / "plan.yaml"))


@pytest.mark.parametrize("kind", KINDS)
def test_commands(kind, tmp_path):
    row = Row("tiny", 256, kind, overrides={"memory_budget_gib": 9})
    settings, command = command_of(row, tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "run")
    assert settings["memory_budget_gib"] == 9
    if not kind.startswith("ours"):
        assert command[2] == kind
        assert command[-2:] == ["--memory_budget_gib", "9"]
        return
    assert (command[0] == "deepspeed") == ("python" not in kind) == ("deepspeed" in settings)
    values = Path(command[-1]).read_text()
    assert "max_seq_length: 256" in values
    assert "memory_budget_gib: 9" in values


def test_data_is_long_enough(tmp_path, tokenizer):
    lines = make_rows(tmp_path, 256, 3).read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(set(texts)) == 3
    assert all(len(text) == 5 * 256 for text in texts)


WORKERS = {
    "benchmark.py": ["--row", "tiny:256:ours_off"],
    "performance/real_shape.py": ["--size", "tiny"],
    "performance/long_run.py": [],
    "performance/merge.py": [],
}


@pytest.mark.parametrize("program", WORKERS)
def test_k7_a_work_folder_of_others(program, run_program, base_folder, tmp_path):
    (tmp_path / "work/base").mkdir(parents=True)
    words = [*WORKERS[program], "--work", tmp_path / "work", "--output_json", tmp_path / "found.json"]
    words += ["--tokenizer", base_folder] if program.endswith(("benchmark.py", "shape.py")) else []
    name = Path(program).name
    refused_by_us(run_program(f"script/{program}", *words), f"--work: {tmp_path / 'work'} holds files that {name} did")
    assert not (tmp_path / "found.json").exists()


@pytest.mark.slow
def test_tiny_rows_end_to_end(tmp_path, base_folder):
    """LongQLoRA and transformers + PEFT on the CPU, then a second call that finds all rows measured."""
    output = tmp_path / "benchmark.json"
    words = ["--work", tmp_path / "work", "--tokenizer", base_folder, "--output_json", output, "--resume"]
    command = [sys.executable, ROOT / "script/benchmark.py", *words, "--sizes", "tiny", "--lengths", "256"]
    command += ["--kinds", "ours_python_fastest", "ours_python_leanest", "ours_python_fp8", "hf", "unsloth"]
    first = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout
    results = json.loads(output.read_text())
    rows = {row["kind"]: row for row in results["rows"]}
    assert "unsloth" in rows.pop("unsloth")["error"]
    for row in rows.values():
        assert row["tokens_per_second"] > 0
        assert len(row["step_seconds"]) == len(row["losses"]) == 4
        assert row["host_peak_gib"] > 0.1
        assert row["peak_reserved_gib"] is None
    losses = [rows[f"ours_python_{kind}"]["losses"] for kind in ("fastest", "fp8")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]
    assert rows["hf"]["losses"][0] == pytest.approx(rows["ours_python_fastest"]["losses"][0], rel=0.02)
    second = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout
    assert "hf ..." in first
    assert "hf ..." not in second
    assert second.splitlines()[-5:] == first.splitlines()[-5:]
    results["versions"]["torch"] = "2.0.1"
    output.write_text(json.dumps(results))
    third = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert third.returncode == 1
    assert f"--resume: {output} was measured with torch 2.0.1; install what it was" in third.stderr


@pytest.mark.slow
def test_tiny_rows_of_another_family(tmp_path, base_folder):
    """Grouped-query Qwen2 with biases, and a vocabulary of which the tokenizer has a hundredth."""
    output, plan = tmp_path / "benchmark.json", tmp_path / "plan.json"
    row = {"size": "tiny-qwen2", "length": 256, "steps": 2}
    full = row | {"kind": "ours_python_fastest", "overrides": {"use_shift_short_attention": False}}
    plan.write_text(json.dumps([full, row | {"kind": "hf"}]))
    words = ["--work", tmp_path / "work", "--tokenizer", base_folder, "--output_json", output, "--plan", plan]
    subprocess.run([sys.executable, ROOT / "script/benchmark.py", *map(str, words)], check=True)
    ours, theirs = (row["losses"][0] for row in json.loads(output.read_text())["rows"])
    assert ours == pytest.approx(theirs, abs=3e-4)  # both rounded to four digits
    assert abs(ours - math.log(40000)) > 3e-3  # not any model's


@pytest.mark.parametrize(
    ("kind", "overrides", "words", "rows"),
    [
        ("ours_fastest", {"sequence_parallel_size": 2}, ["deepspeed", "--num_gpus", "4", "train.py"], 2),
        ("ours_by_heads", {"sequence_parallel_size": 4}, ["deepspeed", "script/performance/train_by_heads.py"], 1),
        ("ours_python_fastest", {}, ["torchrun", "--nproc_per_node=4", "train.py"], 4),
    ],
)
def test_several_cards(tmp_path, monkeypatch, kind, overrides, words, rows):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    row = Row("7b", 8192, kind, 0, overrides, 4)
    _, command = command_of(row, tmp_path, tmp_path, tmp_path / "out")
    assert set(words) <= set(command)
    assert row.rows_per_step == rows
    assert row.name.endswith("4-cards")


@pytest.mark.parametrize(
    ("visible", "flags"),
    [
        (None, ["--num_gpus", "2"]),
        ("", ["--num_gpus", "2"]),
        ("1,3,0", ["--include", "localhost:1,3"]),
        ("1, 3", ["--include", "localhost:1,3"]),
        ("GPU-8a", ["--num_gpus", "2"]),
    ],
)
def test_visible_cards_are_used(monkeypatch, visible, flags):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cards(2) == flags


def test_too_few_visible_cards(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="cards: 2, but CUDA_VISIBLE_DEVICES shows 1"):
        cards(2)
