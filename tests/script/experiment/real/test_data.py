"""Texts of the experiments on a real model: which are measured at which lengths, and how they are recorded."""

import argparse
import hashlib
import json
from dataclasses import replace

import pytest
import yaml

from component.error import UserError
from script.experiment.real.data import describe, length_of, measured_texts, sources, write_mixture
from script.experiment.real.rows import all_rows
from tests.words import write_lines


@pytest.fixture
def texts(tmp_path):
    for name in ("pg-19", "proof"):
        for kind in ("train", "validation"):
            write_lines(
                tmp_path / f"{name}-{kind}.jsonl", {"id": f"{name} 1", "year": 1900, "text": "a"}, {"text": "b"}
            )
    return tmp_path


def flags_of(texts, **changes) -> argparse.Namespace:
    return argparse.Namespace(**{"texts": texts, "length": None, "windows": None, "other": [], **changes})


def test_all_rows_are_measured_on_the_same_texts(texts):
    rows = all_rows()
    windows = [2048, 8192, 32768]
    assert measured_texts(rows["ours"], flags_of(texts)) == {"pg-19": windows, "proof": windows}
    assert measured_texts(rows["ours-131072"], flags_of(texts, other=["x"])) == {
        "pg-19": windows,
        "proof": windows,
        "pg-19-131072": [32768, 131072],
        "proof-131072": [32768, 131072],
        "other": [2048],
    }
    short = flags_of(texts, length=96, windows=[48], other=["x"])
    assert measured_texts(rows["ours-131072"], short) == {"pg-19": [48, 96], "proof": [48, 96], "other": [48]}
    assert [length_of(rows["ours-131072"], flags) for flags in (short, flags_of(texts))] == [96, 131072]
    assert length_of(replace(rows["ours"], length=64), short) == 64


def test_sources(texts):
    assert sources(texts, "train") == {name: str(texts / f"{name}-train.jsonl") for name in ("pg-19", "proof")}
    with pytest.raises(UserError, match="holds no file NAME-other"):
        sources(texts, "other")


def test_a_third_of_the_mixture_is_short(tmp_path):
    write_mixture(["a", "b"], 32768, tmp_path / "mixture.yaml")
    entries = yaml.safe_load((tmp_path / "mixture.yaml").read_text())["sources"]
    share = {
        name: sum(entry["share"] for entry in entries if entry["name"].startswith(name)) for name in ("long", "short")
    }
    assert share["short"] / sum(share.values()) == pytest.approx(1 / 3)
    assert {entry["max_tokens"] for entry in entries if entry["name"].startswith("short")} == {2048}
    assert {entry["min_tokens"] for entry in entries if entry["name"].startswith("long")} == {32769}


def test_texts_are_named(texts, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    found = describe(base, [str(texts / "proof-train.jsonl")])
    assert found == {
        "base": {"name": "base", "sha256": {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}},
        "texts": [
            {
                "file": "proof-train.jsonl",
                "sha256": hashlib.sha256((texts / "proof-train.jsonl").read_bytes()).hexdigest(),
                "count": 2,
                "texts": [{"id": "proof 1", "year": 1900}],
            }
        ],
    }
    json.dumps(found)
