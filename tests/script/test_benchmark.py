"""script/benchmark.py: which rows, what is kept, what the numbers mean; and a tiny row measured for real (slow)."""

import argparse
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import TrainerState, TrainingArguments

from component.error import UserError
from component.train.argument import LongQLoRAArguments
from component.train.callback import SpeedCallback
from script.benchmark import KINDS, OURS, Row, asked_rows, command_of, is_done, make_rows
from script.performance.peers import rolled_s2
from script.performance.report import failure, median_step, read_results, speed, step_flop, table

ROOT = Path(__file__).resolve().parents[2]


def flags(**given) -> argparse.Namespace:
    nothing = {"sizes": [], "lengths": [], "kinds": [], "row": [], "plan": None}
    return argparse.Namespace(**{**nothing, **given})


def test_rows_are_asked_for_in_three_ways(tmp_path):
    plan = tmp_path / "rows.json"
    plan.write_text(
        json.dumps([{"size": "13b", "length": 8192, "kind": "hf", "overrides": {"memory_budget_gib": 32}}])
    )
    rows = asked_rows(
        flags(sizes=["7b"], lengths=[8192, 131072], kinds=["hf", "unsloth"], row=["tiny:256:ours_off:2"], plan=plan)
    )
    assert [(row.size, row.length, row.kind, row.steps) for row in rows] == [
        ("7b", 8192, "hf", 4),
        ("7b", 8192, "unsloth", 4),
        ("7b", 131072, "hf", 3),
        ("7b", 131072, "unsloth", 3),
        ("tiny", 256, "ours_off", 2),
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
        asked_rows(flags(**given))


@pytest.mark.parametrize("entry", [{"size": "7b", "length": 1}, {"size": "7b", "length": 1, "kind": "hf", "x": 1}])
def test_wrong_plans_are_named(tmp_path, entry):
    (tmp_path / "plan.yaml").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=r"--plan: .*needs size, length and kind"):
        asked_rows(flags(plan=tmp_path / "plan.yaml"))


def test_the_first_step_is_warm_up():
    assert median_step([90.0, 1.0, 3.0, 2.0]) == 2.0
    assert median_step([90.0, 1.0]) == 1.0
    assert median_step([90.0]) == 90.0


def test_overrides_of_peers():
    assert Row("7b", 8192, "hf", overrides={"memory_budget_gib": 32}).name == "7b-8192-hf-memory_budget_gib=32"
    with pytest.raises(UserError, match="memory_budget_gib alone"):
        Row("7b", 8192, "hf", overrides={"keep_layers": 3})


def test_what_a_run_says_of_its_speed(monkeypatch):
    """Two steps of 2 and 3 seconds and 100 tokens each, with a minute between them that belongs to neither."""
    times = iter([0.0, 2.0, 62.0, 65.0, 70.0, 71.0])
    monkeypatch.setattr("component.train.callback.time.perf_counter", lambda: next(times))
    arguments = argparse.Namespace(device=torch.device("cpu"))
    state, callback = TrainerState(num_input_tokens_seen=1000), SpeedCallback()

    def step():
        callback.on_step_begin(arguments, state, None)
        state.num_input_tokens_seen += 100
        callback.on_step_end(arguments, state, None)

    step()
    step()
    assert callback.since_last_time()["tokens_per_second"] == 40.0
    step()
    assert callback.since_last_time()["tokens_per_second"] == 100.0
    assert "tokens_per_second" not in callback.since_last_time()
    assert list(callback.step_seconds) == [2.0, 3.0, 1.0]


def test_speed_of_a_measurement():
    found = {
        "num_input_tokens_seen": 400,
        "step_seconds": [9.0, 2.0, 2.0, 4.0],
        "losses": [1.0] * 4,
        "host_peak_gib": 1.5,
    }
    result = speed(100, 4, found, flop=1e12, matrix_tflops=2.0)
    assert result["tokens_per_second"] == 50.0
    assert result["share_of_matrix_rate"] == 0.25
    assert result["host_peak_gib"] == 1.5
    assert result["peak_reserved_gib"] is None
    assert speed(100, 4, found, flop=1e12, matrix_tflops=None)["share_of_matrix_rate"] is None
    assert "99.75 tokens a step, not 100" in speed(100, 4, found | {"num_input_tokens_seen": 399}, 1e12, None)["error"]


@pytest.mark.parametrize("group", [None, 4, 8])
def test_attention_is_counted_pair_by_pair(group):
    """What longer groups add is the pairs that they add: 16 FLOP each, layer by layer and channel by channel."""
    length, hidden, layers = 32, 64, 2  # of the shape "tiny"
    seen = 0
    for shift in (0, (group or 0) // 2):
        for query in range(length):
            seen += sum(
                group is None or (query + shift) // group == (key + shift) // group for key in range(query + 1)
            )
    weights = layers * (4 * hidden**2 + 3 * hidden * 128)
    linear = 6 * length * weights + 4 * length * hidden * 32000
    assert step_flop("tiny", length, group) - linear == 16 * layers * hidden * seen / 2


def test_groups_of_each_kind():
    assert Row("7b", 8192, "unsloth").group is None
    assert Row("7b", 8192, "original").group == 2048
    assert Row("7b", 8192, "ours_fastest").group == 2048
    assert Row("7b", 8192, "ours_fastest", overrides={"group_size": 512}).group == 512
    assert Row("7b", 8192, "ours_fastest", overrides={"use_shift_short_attention": False}).group is None


def measured(kind: str, length: int = 8192, **values) -> dict:
    peaks = {"peak_allocated_gib": 6.7, "peak_reserved_gib": 7.1, "device_in_use_gib": None, "host_peak_gib": 3.0}
    row = {"size": "7b", "length": length, "kind": kind, "overrides": {}, "share_of_matrix_rate": None, **peaks}
    return {**row, **values}


def test_table_sets_speeds_against_unsloth_of_the_same_length():
    lines = table(
        [
            measured("ours_fastest", tokens_per_second=15000.0),
            measured("unsloth", tokens_per_second=10000.0),
            measured("ours_fastest", 32768, tokens_per_second=15000.0),
            measured("unsloth", 32768, error="torch.OutOfMemoryError: CUDA out of memory."),
            measured("ours_fastest", tokens_per_second=12000.0, overrides={"keep_layers": 3}),
        ]
    ).splitlines()
    assert lines[1].split() == ["7b", "8192", "ours_fastest", "15000", "1.50", "-", "-", "6.7", "7.1", "-", "3.0"]
    assert lines[2].split()[3:5] == ["10000", "1.00"]
    assert lines[3].split()[3:5] == ["15000", "-"]
    assert lines[4].split()[3:] == ["torch.OutOfMemoryError:", "CUDA", "out", "of", "memory."]
    assert lines[5].split()[3:6] == ["keep_layers=3", "12000", "1.20"]


def test_resume_leaves_out_what_is_known():
    row = Row("7b", 8192, "unsloth")
    done = measured("unsloth", tokens_per_second=1.0)
    assert is_done(row, [done])
    assert is_done(row, [measured("unsloth", error="torch.OutOfMemoryError: CUDA out of memory.")])
    assert not is_done(row, [measured("unsloth", error="ModuleNotFoundError: No module named 'unsloth'")])
    assert not is_done(row, [done | {"length": 4096}, done | {"kind": "hf"}, done | {"size": "13b"}])
    assert not is_done(row, [done | {"overrides": {"memory_budget_gib": 32}}])


def test_results_are_not_overwritten_unless_asked(tmp_path):
    file = tmp_path / "benchmark.json"
    assert read_results(file, resume=False) == {"rows": []}
    file.write_text('{"rows": [1]}')
    assert read_results(file, resume=True) == {"rows": [1]}
    with pytest.raises(UserError, match="--resume"):
        read_results(file, resume=False)


@pytest.mark.parametrize(
    ("log", "status", "line"),
    [
        ("", None, "not done after 60 s"),
        ("Killed", -9, "ended with status -9"),
        (
            "a\nValueError: first\nb\nRuntimeError: last\n[launch.py] exits with return code = 1",
            1,
            "RuntimeError: last",
        ),
        ("error: x.yaml cannot be trained with:\n  - a: b\n", 1, "error: x.yaml cannot be trained with: - a: b"),
        (
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried\n[rank0]: RuntimeError: later",
            1,
            "torch.OutOfMemoryError: CUDA out of memory. Tried",
        ),
    ],
)
def test_failures_in_one_line(log, status, line):
    assert failure(log, status, 60) == line


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


def test_levers_are_keys_of_the_yaml():
    known = {item.name for item in (*fields(LongQLoRAArguments), *fields(TrainingArguments))}
    assert {name for settings in OURS.values() for name in settings} <= known


def test_rows_of_text_are_long_enough(tmp_path, tokenizer):
    lines = make_rows(tmp_path, 256, 3).read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(set(texts)) == 3
    assert all(len(text) == 5 * 256 for text in texts)


def test_the_original_rolls():
    """Against S2-Attn by the definition of the published code, with heads rolled and groups of a quarter."""
    query, key, value = torch.randn(3, 1, 4, 16, 8)
    found, _ = rolled_s2(None, query, key, value, None, scaling=8**-0.5)
    for head in range(4):
        order = torch.arange(16).roll(-2 if head >= 2 else 0)
        for group in order.split(4):
            for place, token in enumerate(group):
                seen = group[: place + 1]
                weights = (query[0, head, token] @ key[0, head, seen].T * 8**-0.5).softmax(-1)
                torch.testing.assert_close(found[0, token, head], weights @ value[0, head, seen])


@pytest.mark.slow
def test_tiny_rows_end_to_end(tmp_path, base_folder):
    """Ours and transformers + PEFT on the CPU, then a second call that has nothing left to do."""
    output = tmp_path / "benchmark.json"
    words = ["--work", tmp_path / "work", "--tokenizer", base_folder, "--output_json", output, "--resume"]
    command = [sys.executable, ROOT / "script/benchmark.py", *words, "--sizes", "tiny", "--lengths", "256"]
    command += ["--kinds", "ours_python_fastest", "ours_python_leanest", "hf", "unsloth"]
    first = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout
    results = json.loads(output.read_text())
    rows = {row["kind"]: row for row in results["rows"]}
    assert "unsloth" in rows.pop("unsloth")["error"]
    for row in rows.values():
        assert row["tokens_per_second"] > 0
        assert len(row["step_seconds"]) == len(row["losses"]) == 4
        assert row["host_peak_gib"] > 0.1
        assert row["peak_reserved_gib"] is None
    assert rows["hf"]["losses"][0] == pytest.approx(rows["ours_python_fastest"]["losses"][0], rel=0.02)
    second = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout
    assert "hf ..." in first
    assert "hf ..." not in second
    assert second.splitlines()[-4:] == first.splitlines()[-4:]
