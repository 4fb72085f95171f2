"""Which trials of RULER does a result file hold?"""

import json
from pathlib import Path

import pytest

from component.error import UserError
from component.evaluate.ruler import Trial
from component.evaluate.ruler_file import kept_trials, write_trials

ASKED = {"base_model": "m", "seed": 42, "samples": 2, "template": "completion"}


def trial(length: int, task: str, sample: int) -> Trial:
    return Trial(length, task, sample, length - 30, ["a", "b"], "A", 0.5)


CELLS = [(100, "vt"), (200, "vt"), (300, "cwe")]
TRIALS = [trial(100, "vt", 0), trial(100, "vt", 1), trial(200, "vt", 0)]


@pytest.fixture
def file(tmp_path) -> str:
    write_trials(str(tmp_path / "r.json"), {"asked": ASKED, "dtype": "float32"}, TRIALS)
    return str(tmp_path / "r.json")


def test_complete_cells_come_back(file):
    assert kept_trials(file, ASKED, CELLS) == TRIALS[:2]
    found = json.loads(Path(file).read_text())
    assert found["trials"][0] == {
        "length": 100,
        "task": "vt",
        "sample": 0,
        "prompt_tokens": 70,
        "references": ["a", "b"],
        "answer": "A",
        "score": 0.5,
    }
    assert {"command", "hardware", "date", "versions", "dtype"} <= found.keys()


def test_without_a_file_there_is_nothing(tmp_path):
    assert kept_trials(str(tmp_path / "none.json"), ASKED, CELLS) == []


@pytest.mark.parametrize(("name", "value"), [("base_model", "n"), ("seed", 1), ("samples", 3), ("template", "vicuna")])
def test_other_settings_are_refused(name, value, file):
    with pytest.raises(UserError, match=f"--resume: .* {name} {ASKED[name]}, not {value};"):
        kept_trials(file, ASKED | {name: value}, CELLS)


def test_trials_that_would_be_lost_are_refused(file):
    with pytest.raises(UserError, match="also holds vt at 200 tokens"):
        kept_trials(file, ASKED, [(100, "vt"), (300, "vt")])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"asked": {}, "trials": [{"length": 1}]}', '{"asked": 3}'])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json is no result of ruler\.py"):
        kept_trials(str(tmp_path / "x.json"), ASKED, CELLS)


def test_a_score_that_was_edited_is_refused(file):
    record = json.loads(Path(file).read_text())
    record["trials"][0]["score"] = 1.0
    Path(file).write_text(json.dumps(record))
    with pytest.raises(UserError, match="a score does not follow from its answer"):
        kept_trials(file, ASKED, CELLS)
