"""Bases by their hub ids, licenses from cards that are on this machine, and nothing else."""

import json
from pathlib import Path

import pytest

from component.card.base import bases_of, display_name, hub_id, license_of

HUB = "NousResearch/Llama-2-7b-hf"


def card_in(folder: Path, front_matter: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# A base\n", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("name", [HUB, "a/b", "meta-llama/Llama-3.1-8B"])
def test_hub_ids(name):
    assert hub_id(name) == display_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["/models/base", "../base", "base", "a/b/c", "a/b\n", "a/b\n---\nlicense: mit", 'a/"b"', "a/b--c", "a/b.git", "",
     None, 5, "a/b c", "ä/b"],
)  # fmt: skip
def test_no_hub_ids(name):
    assert hub_id(name) is None


def test_of_a_folder_only_the_name():
    assert display_name("/home/me/models/base") == "base"
    assert display_name("/") == "?"


def test_bases_up_to_the_first(tmp_path):
    """Merged folders say what they were made from; other folders do not."""
    for name, base in (("first", HUB), ("second", str(tmp_path / "first"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "longqlora.json").write_text(json.dumps({"base_model": base, "merged_from": "x"}))
    found = bases_of({"base_model": str(tmp_path / "second")})
    assert found == [str(tmp_path / "second"), str(tmp_path / "first"), HUB]
    (tmp_path / "first" / "longqlora.json").write_text(json.dumps({"base_model": HUB}))  # of an adapter
    assert bases_of({"base_model": str(tmp_path / "second")}) == found[:2]


@pytest.mark.parametrize("record", ["{", "[]", '{"merged_from": 1, "base_model": 5}', None])
def test_a_base_with_a_damaged_record_is_the_last(tmp_path, record):
    if record is not None:
        (tmp_path / "longqlora.json").write_text(record)
    assert bases_of({"base_model": str(tmp_path)}) == [str(tmp_path)]


def test_bases_that_name_each_other(tmp_path):
    (tmp_path / "longqlora.json").write_text(json.dumps({"base_model": str(tmp_path), "merged_from": "x"}))
    assert bases_of({"base_model": str(tmp_path)}) == [str(tmp_path)]
    assert bases_of({}) == bases_of({"base_model": ["x"]}) == []


# ---- licenses


def test_the_license_of_a_folders_card(tmp_path):
    base = card_in(tmp_path / "base", "license: llama2\nlanguage: en")
    assert license_of([base]) == ("base", {"license": "llama2"})


def test_a_license_with_name_and_link(tmp_path):
    link = "https://example.com/LICENSE.md"
    base = card_in(tmp_path / "base", f"license: other\nlicense_name: own-1.0\nlicense_link: {link}")
    assert license_of([base]).fields == {"license": "other", "license_name": "own-1.0", "license_link": link}


def test_the_nearest_base_with_a_license(tmp_path):
    near, far = card_in(tmp_path / "near", "language: en"), card_in(tmp_path / "far", "license: mit")
    assert license_of([near, far]) == ("far", {"license": "mit"})


def test_the_license_of_a_downloaded_model(tmp_path, monkeypatch):
    """As hf download leaves it in the cache; without the file, or without the model, none."""
    snapshot = tmp_path / "models--NousResearch--Llama-2-7b-hf" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--NousResearch--Llama-2-7b-hf" / "refs").mkdir()
    (tmp_path / "models--NousResearch--Llama-2-7b-hf" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert license_of([HUB]) is None
    card_in(snapshot, "license: llama2")
    assert license_of([HUB]) == (HUB, {"license": "llama2"})
    assert license_of(["nobody/nothing"]) is None


@pytest.mark.parametrize(
    "front_matter",
    ["license: [mit, x]", 'license: "mit\\n---\\nx"', "license: a b", "license: {}", "license: 5", "- a", "a: [",
     "1: 2", "", "license: <b>"],
)  # fmt: skip
def test_no_license_that_is_none(tmp_path, front_matter):
    assert license_of([card_in(tmp_path / "base", front_matter)]) is None


@pytest.mark.parametrize(
    "more",
    ["license_link: LICENSE", "license_link: javascript:x", 'license_name: "a`b"', "license_link: https://x/)("],
)
def test_what_cannot_stand_in_a_card_is_left_out(tmp_path, more):
    assert license_of([card_in(tmp_path / "base", f"license: other\n{more}")]).fields == {"license": "other"}


def test_a_card_elsewhere_is_not_read(tmp_path):
    card_in(tmp_path / "secret", "license: mit")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").symlink_to(tmp_path / "secret" / "README.md")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "README.md").write_bytes(b"\xff\xfe---\n")
    bases = [tmp_path / "base", tmp_path / "binary", tmp_path / "nowhere", tmp_path / "secret" / "README.md"]
    assert license_of([str(base) for base in bases]) is None
