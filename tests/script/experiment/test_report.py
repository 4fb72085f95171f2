"""Tables and figures of all runs, which replace only what they may."""

import json

import pytest

from tests.outcome import refused_by_us
from tests.script.experiment.test_results import result


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work" / "results"
    folder.mkdir(parents=True)
    origin = {"command": "run.py", "hardware": "CPU", "date": "2026-11-25", "versions": {}}
    for name, perplexity in (("base", 9.0), ("longqlora", 5.0)):
        (folder / f"{name}.json").write_text(json.dumps(result(name, 0, perplexity) | origin))
    for file in folder.iterdir():
        file.write_text(file.read_text().replace('"by_position": [0]', '"by_position": []'))
    return folder.parent


def test_tables_numbers_and_figures(work, run_program, tmp_path):
    words = ["script/experiment/report.py", "--work", work, "--output", tmp_path / "out"]
    outcome = run_program(*words)
    assert outcome.status == 0, outcome.err
    assert "| base, positions as they are | - | 9.00 | - | 1.50 |" in outcome.out
    assert outcome.out.strip() == (tmp_path / "out" / "experiment.md").read_text().strip()
    rows = json.loads((tmp_path / "out" / "experiment.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["base", "longqlora"]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"experiment_lengths_4096.png", "experiment_positions.png"} <= names
    assert not [name for name in names if name.startswith(".")]
    refused_by_us(run_program(*words), "--output: ", "exists; name another file, or replace it with --overwrite")
    assert run_program(*words, "--overwrite").status == 0


@pytest.mark.parametrize("name", ["experiment.md", "experiment.json", "experiment_rank.png"])
def test_k7_files_of_others(name, work, run_program, tmp_path):
    (tmp_path / name).write_text("mine")
    refused_by_us(run_program("script/experiment/report.py", "--work", work, "--output", tmp_path), name, "exists")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_nothing_measured(run_program, tmp_path):
    outcome = run_program("script/experiment/report.py", "--work", tmp_path, "--output", tmp_path)
    refused_by_us(outcome, "--work: ", "holds no results; run script/experiment/run.py first")
