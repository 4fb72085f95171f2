"""How does a measurement reach its file?"""

import json
import math
import re

import pytest
import torch

from component.storage.result import library_versions, origin, write_json


def test_written_as_read(tmp_path):
    record = {"text": "two  spaces [ { \n and a break", "rows": [[1, 2.5], [3, None]], "nested": {"a": {"b": []}}}
    write_json(tmp_path / "r.json", record)
    assert json.loads((tmp_path / "r.json").read_text()) == record
    assert "[ 1, 2.5 ]" in (tmp_path / "r.json").read_text(), "innermost lists are on one line"
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_json_knows_no_infinity(tmp_path):
    write_json(tmp_path / "r.json", {"perplexity": math.inf, "rows": [{"loss": math.nan, "tokens": 0}], "t": (1.0,)})
    expected = {"perplexity": None, "rows": [{"loss": None, "tokens": 0}], "t": [1.0]}
    assert json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail) == expected


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "r.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "r.json", {"new": object()})
    assert json.loads((tmp_path / "r.json").read_text()) == {"old": 1}


def test_origin(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/elsewhere/script/evaluate/evaluate.py", "--data_path", "a b.bin"])
    found = origin()
    assert found["command"] == "python evaluate.py --data_path 'a b.bin'"
    assert {"torch", "transformers"} <= found["versions"].keys()
    assert found["hardware"]


def test_library_versions():
    versions = library_versions()
    assert versions["torch"] == torch.__version__
    assert {"transformers", "peft", "bitsandbytes"} <= versions.keys()
    assert all(re.match(r"\d+\.\d+", version) for version in versions.values())
