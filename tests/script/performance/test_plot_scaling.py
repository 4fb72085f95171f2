"""script/performance/plot_scaling.py: speed and memory by number of GPUs."""

import matplotlib.pyplot as plt

from script.performance.plot_scaling import draw, series


def row(length: int, cards: int, speed: float, **overrides) -> dict:
    shared = {"size": "7b", "kind": "ours_fastest", "peak_reserved_gib": 30.0, "overrides": overrides}
    return {"length": length, "cards": cards, "tokens_per_second": speed, **shared}


def test_lines(tmp_path):
    rows = [
        row(8192, 4, 38.0, sequence_parallel_size=4),
        row(8192, 2, 19.0, sequence_parallel_size=2),
        row(8192, 2, 18.0),
        row(8192, 1, 10.0),
        row(8192, 2, 9.0, sequence_parallel_size=2, use_shift_short_attention=False),
        row(4096, 1, 12.0),
        {**row(8192, 2, 17.0, sequence_parallel_size=2), "kind": "ours_by_heads"},
        {"size": "7b", "length": 8192, "cards": 2, "overrides": {}, "error": "killed"},
    ]
    lines = series(rows)
    speeds = {name: [(row["cards"], row["tokens_per_second"]) for row in found] for name, found in lines.items()}
    assert speeds == {
        "7B, 8192 tokens, S2-Attn, each row split": [(1, 10.0), (2, 19.0), (4, 38.0)],
        "7B, 8192 tokens, S2-Attn, a row per GPU": [(1, 10.0), (2, 18.0)],
        "7B, 8192 tokens, full attention, each row split": [(2, 9.0)],
        "7B, 8192 tokens, S2-Attn, each row split by heads": [(1, 10.0), (2, 17.0)],
        "7B, 4096 tokens, S2-Attn": [(1, 12.0)],
    }
    draw(lines, "title", tmp_path / "plot.png")
    speed, _ = plt.gcf().axes
    drawn = [list(zip(*line.get_data(), strict=True)) for line in speed.get_lines()]
    assert [(1, 10.0), (2, 20.0), (4, 40.0)] in drawn  # the ideal
    plt.close("all")


def test_the_program(run_program, tmp_path):
    file = tmp_path / "plot.png"
    outcome = run_program("script/performance/plot_scaling.py", "figure/scaling.json", "--output", file)
    assert outcome.status == 0, outcome.err
    assert file.stat().st_size > 10_000
    plt.close("all")
