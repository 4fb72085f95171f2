"""script/performance/plot.py: memory and speed by sequence length."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

from script.performance.plot import KINDS, draw, line_of
from tests.outcome import refused_by_us


def row(length: int, **values) -> dict:
    return {"length": length, "overrides": {}, "peak_reserved_gib": 7.0, "tokens_per_second": 100.0, **values}


def test_lines_and_crosses(tmp_path):
    plt.close("all")
    ours = [row(16384, peak_reserved_gib=12.0), row(8192, overrides={"memory_budget_gib": 9})]
    hf = [row(8192), {"length": 16384, "overrides": {}, "error": "torch.OutOfMemoryError: CUDA out of memory."}]
    draw({**{kind: [] for kind in KINDS}, "ours_fastest": ours, "hf": hf}, "title", tmp_path / "plot.png")
    memory, speed = plt.gcf().axes
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in speed.get_lines()}
    assert lines == {
        KINDS["ours_fastest"][0]: [(8192, 100.0), (16384, 100.0)],
        KINDS["hf"][0]: [(8192, 100.0)],
    }
    points = [list(zip(*line.get_data(), strict=True)) for line in memory.get_lines()]
    assert [(8192, 7.0), (16384, 12.0)] in points
    assert [(16384, 0.97)] in points  # the cross of what ran out of memory
    assert "held to 9 GiB" in [text.get_text() for text in memory.texts]
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    plt.close("all")


def test_the_program(run_program, tmp_path):
    outcome = run_program("script/performance/plot.py", "figure/benchmark.json", "--output", tmp_path / "plot.png")
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    plt.close("all")


def test_k7_files_of_others(run_program, tmp_path):
    """The benchmark itself, and a figure without --overwrite."""
    (tmp_path / "b.json").write_bytes(Path("figure/benchmark.json").read_bytes())
    (tmp_path / "plot.png").write_text("mine")
    words = ["script/performance/plot.py", tmp_path / "b.json", "--output"]
    refused_by_us(
        run_program(*words, tmp_path / "b.json", "--overwrite"), "would be overwritten, but benchmark reads it"
    )
    refused_by_us(run_program(*words, tmp_path / "plot.png"), "--output: ", "or replace it with --overwrite")
    assert (tmp_path / "plot.png").read_text() == "mine"
    assert run_program(*words, tmp_path / "plot.png", "--overwrite").status == 0
    plt.close("all")


def test_lines_of_rows():
    assert line_of(row(8192, kind="ours_python_fp8", overrides={"cuda_graph": True})) == "ours_fp8"
    assert line_of(row(8192, kind="ours_python_fastest", overrides={"memory_budget_gib": 6})) == "ours_leanest"
    assert line_of(row(8192, kind="ours_fastest", overrides={"memory_budget_gib": 22})) == "ours_fastest"
    assert line_of(row(8192, kind="unsloth")) == "unsloth"


def test_the_fastest_of_a_file_is_shown(run_program, tmp_path, monkeypatch):
    shown = {"size": "7b", "kind": "ours_fp8"}
    graph = {"size": "7b", "kind": "ours_python_fp8", "overrides": {"cuda_graph": True}}
    full = {**graph, "overrides": {"use_shift_short_attention": False}}
    speeds = [(shown, 200.0), (graph, 300.0), (shown, 100.0), (full, 900.0)]
    rows = [row(8192, tokens_per_second=speed, **values) for values, speed in speeds]
    (tmp_path / "b.json").write_text(json.dumps({"hardware": "H200", "rows": rows}))
    monkeypatch.setattr(plt, "close", lambda *_: None)
    words = ["script/performance/plot.py", tmp_path / "b.json", "--output", tmp_path / "plot.png"]
    assert run_program(*words).status == 0
    (line,) = plt.gcf().axes[1].get_lines()
    assert list(zip(*line.get_data(), strict=True)) == [(8192, 300.0)]


def test_several_files(run_program, tmp_path, monkeypatch):
    """Rows of the first file win; files of different cards are refused."""
    first, second = tmp_path / "new.json", tmp_path / "old.json"
    shown = {"size": "7b", "kind": "unsloth"}
    first.write_text(json.dumps({"hardware": "H200", "rows": [row(8192, tokens_per_second=200.0, **shown)]}))
    second.write_text(json.dumps({"hardware": "H200", "rows": [row(8192, **shown), row(16384, **shown)]}))
    monkeypatch.setattr(plt, "close", lambda *_: None)
    words = ["script/performance/plot.py", first, second, "--output", tmp_path / "plot.png", "--overwrite"]
    assert run_program(*words).status == 0
    (line,) = plt.gcf().axes[1].get_lines()
    assert list(zip(*line.get_data(), strict=True)) == [(8192, 200.0), (16384, 100.0)]
    second.write_text(second.read_text().replace("H200", "H100"))
    refused_by_us(run_program(*words), "benchmark: measured on H100, H200")
