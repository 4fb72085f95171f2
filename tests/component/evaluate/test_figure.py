"""How are results drawn? Read back from the axes."""

import matplotlib.pyplot as plt
import pytest

from component.evaluate.figure import (
    draw_lengths,
    draw_positions,
    draw_tasks,
    has_context_line,
    heat_map,
    longest_shared,
    share_map,
)


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def model(*lengths: int, positions: tuple[int, ...] = ()) -> dict:
    bucket = {"start": 0, "end": 128, "tokens": 128, "perplexity": 3.0}
    rows = [{"seq_len": n, "perplexity": n / 100, "by_position": [bucket] * (n in positions)} for n in lengths]
    return {"name": "x", "rows": rows}


@pytest.mark.parametrize(
    ("models", "length"),
    [
        ([model(256, 512, positions=(256, 512))], 512),
        ([model(256, 512, positions=(256, 512)), model(256, 1024, positions=(256, 1024))], 256),
        ([model(256, positions=(256,)), model(256)], None),
        ([model(256, positions=(256,)), model(512, positions=(512,))], None),
    ],
)
def test_the_longest_length_measured_by_position(models, length):
    assert longest_shared(models) == length


@pytest.mark.parametrize(
    ("context", "is_drawn"), [(255, False), (256, True), (700, True), (1023, True), (1024, False)]
)
def test_where_a_context_ends_inside_the_lengths(context, is_drawn, axes):
    assert has_context_line([256, 512, 1024], context) == is_drawn
    heat_map(axes, [[1.0, 0.5, 0.0]], [0.5], [256, 512, 1024], context)
    assert [line.get_xdata()[0] for line in axes.get_lines()] == ([1 + (context >= 512)] if is_drawn else [])


def test_a_cell_per_depth_and_length(axes):
    heat_map(axes, [[1.0, 0.25], [0.5, 0.0]], [0.0, 0.75], [256, 512], 4096)
    assert [text.get_text() for text in axes.texts] == ["100", "25", "50", "0"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "512"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 %", "75 %"]
    assert axes.yaxis_inverted()


def test_a_cell_per_task_and_length(axes, tmp_path):
    share_map(axes, [[1.0, 0.256], [0.5, 0.0], [0.9, 0.1]], ["vt", "cwe", "fwe"], [256, 512], 300)
    assert [text.get_text() for text in axes.texts] == ["100", "26", "50", "0", "90", "10"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["vt", "cwe", "fwe"]
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [1]
    draw_tasks([[1.0, 0.5]], ["vt"], [256, 512], 300, str(tmp_path / "f.png"))
    assert (tmp_path / "f.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_infinite_perplexities_are_not_drawn(axes):
    rows = [{"seq_len": 256, "perplexity": 7.0}, {"seq_len": 512, "perplexity": None}]
    draw_lengths(axes, {"name": "base", "rows": rows}, {})
    (line,) = axes.get_lines()
    assert (line.get_label(), list(zip(*line.get_data(), strict=True))) == ("base", [(256, 7.0)])


def test_buckets_are_points_in_their_middles(axes):
    buckets = [
        {"start": 0, "end": 100, "tokens": 99, "perplexity": 9.0},
        {"start": 100, "end": 200, "tokens": 0, "perplexity": None},
        {"start": 200, "end": 256, "tokens": 56, "perplexity": 5.0},
    ]
    rows = [{"seq_len": 128, "by_position": []}, {"seq_len": 256, "by_position": buckets}]
    draw_positions(axes, {"name": "base", "rows": rows}, 256, {})
    (line,) = axes.get_lines()
    assert list(zip(*line.get_data(), strict=True)) == [(50, 9.0), (228, 5.0)]
