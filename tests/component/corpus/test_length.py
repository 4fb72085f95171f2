"""How long are the texts? Literal figures, and a picture that is one."""

import pytest
from PIL import Image

from component.corpus.length import describe_lengths, draw_lengths


def test_figures(monkeypatch):
    monkeypatch.setattr("component.corpus.length.BINS", 2)
    assert describe_lengths([4, 1, 2, 3, 90]) == {
        "texts": 5,
        "tokens": 100,
        "min": 1,
        "mean": 20.0,
        "median": 3.0,
        "max": 90,
        "percentiles": {
            "1": 1.0,
            "5": 1.2,
            "10": 1.4,
            "25": 2.0,
            "50": 3.0,
            "75": 4.0,
            "90": 55.6,
            "95": 72.8,
            "99": 86.6,
        },
        "histogram": {"edges": [0, 50, 100], "texts": [4, 1]},
    }
    assert describe_lengths([]) == {"texts": 0, "tokens": 0}


@pytest.mark.parametrize("lengths", [[5], [1, 2], [4096, 32768], [100, 10**6], list(range(1, 200)), [7, 7, 7]])
def test_every_text_is_in_the_histogram(lengths):
    histogram = describe_lengths(lengths)["histogram"]
    assert sum(histogram["texts"]) == len(lengths)
    assert histogram["edges"] == sorted(set(histogram["edges"]))
    assert len(histogram["edges"]) == len(histogram["texts"]) + 1 <= 43
    assert histogram["edges"][0] <= min(lengths) <= max(lengths) < histogram["edges"][-1] + 1


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c", "d"], ["$x_{$", "b"]])
def test_a_picture(tmp_path, names):
    lengths_of = {name: describe_lengths([10 * (at + 1), 500]) for at, name in enumerate(names)}
    draw_lengths(lengths_of | {"none": describe_lengths([])}, tmp_path / "lengths.png", "title of $x_{$")
    with Image.open(tmp_path / "lengths.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    assert [file.name for file in tmp_path.iterdir()] == ["lengths.png"]
