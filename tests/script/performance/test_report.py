"""Speed, FLOP and errors of a benchmark's rows, and the table of them."""

import pytest

from component.error import UserError
from script.performance.report import (
    attention_pairs,
    failure,
    median_step,
    mfu,
    per_gib,
    published_flop,
    read_results,
    speed,
    step_flop,
    table,
)


def test_the_first_step_is_warm_up():
    assert median_step([90.0, 1.0, 3.0, 2.0]) == 2.0
    assert median_step([90.0, 1.0]) == 1.0
    assert median_step([90.0]) == 90.0


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
    assert "startup_seconds" not in result, "a baseline's"
    stages = {"imports": 7.0, "first step": 3.0}
    assert speed(100, 4, found | {"startup_seconds": stages}, 1e12, None)["startup_seconds"] == stages
    assert (
        "trained on 99.75 tokens per step, not 100"
        in speed(100, 4, found | {"num_input_tokens_seen": 399}, 1e12, None)["error"]
    )


@pytest.mark.parametrize("group", [None, 4, 8])
def test_attention_is_counted_pair_by_pair(group):
    """Every (query, key) pair costs 16 FLOP per layer and channel."""
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


def test_model_flop_utilization_as_published():
    """LLaMA2-7B has 6.74e9 parameters, of which 131e6 are the embedding, whose lookup is no product."""
    length = 8192
    attention = 6 * 32 * 4096 * (length + 1)  # per token
    expected = length * (6 * (6_738_415_616 - 131_072_000 - 65 * 4096) + attention)
    assert published_flop("7b", length, None) == pytest.approx(expected, rel=1e-9)
    assert attention_pairs(4, None) == 10
    grouped = published_flop("7b", length, 2048)
    assert published_flop("7b", length, None) - grouped == pytest.approx(
        12 * 32 * 4096 * (attention_pairs(length, None) - attention_pairs(length, 2048))
    )
    assert mfu(expected, [9.0, 1.0, 0.8, 1.2], 989.0) == round(expected / 989e12, 3)
    assert mfu(2 * expected, [1.0], 989.0, cards=2) == round(expected / 989e12, 3)
    assert mfu(expected, [1.0], None) is None


def test_tokens_per_second_and_gib():
    assert per_gib({"tokens_per_second": 100.0, "peak_reserved_gib": 8.0}) == 12.5
    assert per_gib({"tokens_per_second": 100.0, "peak_reserved_gib": None}) is None


def test_the_program_prints_the_table(run_program):
    outcome = run_program("script/performance/report.py", "figure/benchmark.json")
    assert (outcome.status, outcome.out.split()[:3]) == (0, ["size", "tokens", "kind"])


def measured(kind: str, length: int = 8192, **values) -> dict:
    peaks = {"peak_allocated_gib": 6.7, "peak_reserved_gib": 7.1, "device_in_use_gib": None, "host_peak_gib": 3.0}
    row = {"size": "7b", "length": length, "kind": kind, "overrides": {}, "share_of_matrix_rate": None, **peaks}
    return {**row, **values}


def test_the_table_compares_with_unsloth_at_the_same_length():
    lines = table(
        [
            measured("ours_fastest", tokens_per_second=15000.0),
            measured("unsloth", tokens_per_second=10000.0),
            measured("ours_fastest", 32768, tokens_per_second=15000.0),
            measured("unsloth", 32768, error="torch.OutOfMemoryError: CUDA out of memory."),
            measured("ours_fastest", tokens_per_second=12000.0, overrides={"keep_layers": 3}),
        ]
    ).splitlines()
    assert lines[1].split()[:5] == ["7b", "8192", "ours_fastest", "15000", "1.50"]
    assert lines[1].split()[5:] == ["-", "-", "2112.7", "-", "6.7", "7.1", "-", "3.0"]
    assert lines[2].split()[3:5] == ["10000", "1.00"]
    assert lines[3].split()[3:5] == ["15000", "-"]
    assert lines[4].split()[3:] == ["torch.OutOfMemoryError:", "CUDA", "out", "of", "memory."]
    assert lines[5].split()[3:6] == ["keep_layers=3", "12000", "1.20"]


def test_results_are_not_overwritten(tmp_path):
    file = tmp_path / "benchmark.json"
    assert read_results(file, resume=False) == {"rows": []}
    file.write_text('{"rows": [1]}')
    assert read_results(file, resume=True) == {"rows": [1]}
    with pytest.raises(UserError, match="--resume"):
        read_results(file, resume=False)


@pytest.mark.parametrize(
    ("log", "status", "line"),
    [
        ("", None, "killed after 60 s"),
        ("Killed", -9, "exit status -9"),
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
def test_errors_in_one_line(log, status, line):
    assert failure(log, status, 60) == line
