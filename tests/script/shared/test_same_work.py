"""A work folder is not taken for one of other flags or files."""

import pytest

from component.error import UserError
from component.storage.result import write_json
from script.shared.same_work import same_work


@pytest.fixture
def begun(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    record = tmp_path / "flags.json"
    write_json(record, same_work(record, {"steps": 3}, {"texts": tmp_path / "a.txt"}))
    return record


def test_the_same(begun, tmp_path):
    same_work(begun, {"steps": 3}, {"texts": (tmp_path / "a.txt").rename(tmp_path / "moved.txt")})


def test_another_flag(begun, tmp_path):
    with pytest.raises(UserError, match=f"^--steps: 4, but it was 3 for what is in {tmp_path}; use the same"):
        same_work(begun, {"steps": 4}, {"texts": tmp_path / "a.txt"})


def test_other_files(begun, tmp_path):
    with pytest.raises(UserError, match=f"^--work: more changed since {tmp_path} was begun"):
        same_work(begun, {"steps": 3}, {"texts": tmp_path / "a.txt", "more": tmp_path / "a.txt"})
    with pytest.raises(UserError, match=r"^--work: texts changed since"):
        same_work(begun, {"steps": 3}, {})
    (tmp_path / "a.txt").write_text("b")
    with pytest.raises(UserError, match=r"^--work: texts changed since"):
        same_work(begun, {"steps": 3}, {"texts": tmp_path / "a.txt"})


def test_of_an_older_version(tmp_path):
    record = tmp_path / "flags.json"
    write_json(record, {"steps": 3})
    same_work(record, {"steps": 3, "windows": [1]}, {"texts": tmp_path})
