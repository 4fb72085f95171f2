"""plot_perplexity.py: what is drawn, and what is refused."""

import json

import matplotlib.pyplot as plt
import pytest

from component.error import UserError
from component.evaluate.figure import longest_shared
from component.storage.result import write_json
from script.evaluate.plot_perplexity import draw, read_models

PLOT = "script/evaluate/plot_perplexity.py"


def row(seq_len: int, perplexity: float | None, positions: bool = True) -> dict:
    half = seq_len // 2
    buckets = [
        {"start": 0, "end": half, "tokens": 5, "loss": 1.0, "perplexity": 3.0},
        {"start": half, "end": seq_len, "tokens": 0, "loss": None, "perplexity": None},
    ]
    return {"seq_len": seq_len, "windows": 2, "perplexity": perplexity, "by_position": buckets if positions else []}


def result(*rows: dict, protocol: str = "longlora") -> dict:
    return {"protocol": protocol, "data_path": "/some/where/t.bin", "results": list(rows)}


@pytest.fixture
def files(tmp_path):
    """A result of one model, and one of two (--compare)."""
    write_json(tmp_path / "alone.json", result(row(512, 5.0), row(256, 6.0)))
    models = [{"name": "base", **result(row(256, 7.0), row(512, None))}]
    models += [{"name": "ours", **result(row(256, 8.0), row(512, 4.0), row(1024, 3.0))}]
    write_json(tmp_path / "both.json", {"models": models})
    return [tmp_path / "alone.json", tmp_path / "both.json"]


def test_names_and_order(files):
    models = read_models(files, None)
    assert [model["name"] for model in models] == ["alone", "base", "ours"]
    assert [row["seq_len"] for row in models[0]["rows"]] == [256, 512]
    assert [model["name"] for model in read_models(files, ["a", "b", "c"])] == ["a", "b", "c"]
    assert longest_shared(models) == 512


def test_lines(files, tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    draw(read_models(files, None), tmp_path / "p.png")
    lengths, positions = plt.gcf().axes
    assert [line.get_label() for line in lengths.get_lines()] == ["alone", "base", "ours"]
    drawn = [list(zip(*line.get_data(), strict=True)) for line in lengths.get_lines()]
    assert drawn == [[(256, 6.0), (512, 5.0)], [(256, 7.0)], [(256, 8.0), (512, 4.0), (1024, 3.0)]]
    assert [list(zip(*line.get_data(), strict=True)) for line in positions.get_lines()] == [[(128.0, 3.0)]] * 3
    assert "512" in positions.get_title()
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    monkeypatch.undo()
    plt.close("all")


def test_names_with_dollar_signs_are_not_formulas(files, tmp_path):
    draw(read_models(files, ["a", "$x_{$", "c"]), tmp_path / "p.png")
    assert (tmp_path / "p.png").is_file()


def test_the_program(files, run_program, tmp_path):
    outcome = run_program(PLOT, *files, "--output", tmp_path / "p.png")
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert outcome.out == f"perplexity of 3 models -> {tmp_path}/p.png\n"


@pytest.mark.parametrize(
    ("target", "words", "told"),
    [
        ("p.png", [], "p.png exists; name another file, or replace it with --overwrite"),
        ("alone.json", ["--overwrite"], "would be overwritten, but results reads it"),
    ],
    ids=["K7-figure", "K7-result"],
)
def test_k7_files_of_the_user(target, words, told, files, run_program, tmp_path):
    (tmp_path / "p.png").write_text("mine")
    before = (tmp_path / target).read_bytes()
    outcome = run_program(PLOT, *files, "--output", tmp_path / target, *words)
    assert outcome.status == 1
    assert told in outcome.err
    assert (tmp_path / target).read_bytes() == before


def test_without_positions(tmp_path):
    write_json(tmp_path / "r.json", result(row(256, 6.0, positions=False)))
    models = read_models([tmp_path / "r.json"], None)
    assert longest_shared(models) is None
    draw(models, tmp_path / "p.png")
    assert (tmp_path / "p.png").is_file()


@pytest.mark.parametrize("content", ["{", "[]", '{"results": []}', json.dumps({"models": [{"name": "x"}]})])
def test_not_a_result(content, tmp_path):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError, match=r"r\.json: not a result of evaluate\.py"):
        read_models([tmp_path / "r.json"], None)


def test_mistakes(files, tmp_path):
    with pytest.raises(UserError, match="--names: 1 for 3 models"):
        read_models(files, ["one"])
    with pytest.raises(UserError, match="not a result"):
        read_models([tmp_path / "missing.json"], None)
    write_json(tmp_path / "other.json", result(row(256, 6.0), protocol="sliding"))
    with pytest.raises(UserError, match="longlora, sliding cannot be compared"):
        read_models([*files, tmp_path / "other.json"], None)
