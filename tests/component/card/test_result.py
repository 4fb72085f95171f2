"""Which files are results of a folder; what they say, from results as the programs write them."""

import copy
import hashlib
import json
import os
from pathlib import Path

import pytest

from component.card.result import results_of, sections_in

SETTING = {
    "weights": "float16", "dtype": "float16", "attention": "full (sdpa)", "rope_type": "yarn", "rope_factor": 8.0,
    "context_tokens": 32768,
}  # fmt: skip
ORIGIN = {"command": "python x", "hardware": "NVIDIA H200", "date": "2026-11-23", "versions": {"torch": "2.11.0"}}
HOW = "Weights `float16`, context of 32768 tokens, attention `full (sdpa)`, `NVIDIA H200`, `torch 2.11.0`, 2026-11-23."
ROW = {"protocol": "longlora", "seq_len": 8192, "stride": 8192, "windows": 3, "tokens_scored": 24573, "loss": 2.0,
       "perplexity": 7.38906}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("")
    os.utime(tmp_path / "model" / "model.safetensors", (1e9, 1e9))
    return tmp_path / "model"


def perplexity(base: object, peft: object = None, **changes) -> dict:
    setting = {"base_model": base and str(base), "peft_model": peft and str(peft), "data_path": "/data/pg19.bin"}
    return {**setting, "protocol": "longlora", **SETTING, "results": [ROW], **changes}


def sections(result: dict, folder: Path) -> list[str]:
    return sections_in(result, folder, folder.parent / "result.json")


def test_perplexity(folder):
    assert sections({**perplexity(folder), **ORIGIN}, folder) == [
        "### Perplexity of `pg19.bin`\n\nProtocol `longlora`: windows of a fixed length, every token but the first "
        f"scored, mean loss per window averaged, the last window left out. {HOW}\n\n"
        "| window, tokens | stride | windows | tokens scored | perplexity |\n| --- | --- | --- | --- | --- |\n"
        "| 8192 | 8192 | 3 | 24573 | 7.389 |"
    ]


def test_of_several_models_only_this_one(folder):
    """Of a pair, the adapter is the model: a base is not what an adapter on it scores."""
    models = [
        perplexity(folder.parent / "other"),
        perplexity(folder, folder.parent / "adapter"),
        perplexity("base", folder, data_path="a.bin"),
        perplexity(folder, data_path="b.bin"),
    ]
    found = sections({"models": models, **ORIGIN}, folder)
    assert [section.splitlines()[0] for section in found] == ["### Perplexity of `a.bin`", "### Perplexity of `b.bin`"]


@pytest.mark.parametrize("named", [None, "/models/base", "owner/base", "/elsewhere/base/", "other", "/models/other"])
def test_of_an_adapter_on_another_base_nothing_is_told(named, folder):
    (folder / "longqlora.json").write_text(json.dumps({"base_model": "/models/base"}))
    found = sections({**perplexity(named, folder), **ORIGIN}, folder)
    assert bool(found) is (named is None or "base" in named)


def test_ruler(folder):
    asked = {"base_model": str(folder), "peft_model": None, "samples": 20, "template": "completion"}
    result = {"asked": asked, **SETTING, **ORIGIN, "lengths": [4096, 8192], "tasks": ["vt", "fwe"], "trials": []}
    assert sections(result, folder) == [], "interrupted: no scores yet"
    result |= {"scores": [[1.0, 0.75], [0.5, 0.25]], "means": [0.75, 0.5]}
    (found,) = sections(result, folder)
    assert "20 samples per task and length" in found
    assert "prompts as `completion`" in found
    assert found.endswith(
        f"{HOW}\n\n| task, tokens | 4096 | 8192 |\n| --- | --- | --- |\n| `vt` | 100.0 | 75.0 |\n| `fwe` | 50.0 |"
        " 25.0 |\n| mean | 75.0 | 50.0 |"
    )


def test_passkey(folder):
    result = {"base_model": None, "peft_model": str(folder), **SETTING, **ORIGIN, "lengths": [4096],
              "depths": [0.0, 0.5], "trials_each": 10, "accuracy": [[1.0], [0.9]]}  # fmt: skip
    (found,) = sections(result, folder)
    assert "10 trials per length and depth" in found
    assert found.endswith("| depth, tokens | 4096 |\n| --- | --- |\n| 0 % | 100 % |\n| 50 % | 90 % |")


@pytest.mark.parametrize("where", ["absolute", "working folder", "beside the file", "repository", "program's folder"])
def test_paths_as_they_are_typed(folder, where, monkeypatch):
    monkeypatch.setattr(
        "component.card.result.RUN_FROM", (".", str(folder.parent / "r"), str(folder.parent / "r/s/e"))
    )
    named = {"absolute": folder, "repository": "../model", "program's folder": "../../../model"}.get(where, "model")
    (folder.parent / "r" / "s" / "e").mkdir(parents=True)
    if where == "working folder":
        monkeypatch.chdir(folder.parent)
    assert len(sections({**perplexity(named), **ORIGIN}, folder)) == 1
    assert sections({**perplexity(f"{named}-2"), **ORIGIN}, folder) == []


@pytest.mark.parametrize("key", ["protocol", "data_path", "results", "weights", "versions", "date", "hardware"])
@pytest.mark.parametrize("value", [None, "x", [], {}, 5, [["a"]], [{"seq_len": "x"}]])
def test_what_is_not_as_expected_is_left_out(folder, key, value):
    """Or quoted: never an error, and never markup."""
    result = copy.deepcopy({**perplexity(folder), **ORIGIN})
    result[key] = value
    found = sections(result, folder)
    assert len(found) <= 1
    del result[key]
    assert sections(result, folder) == []


def test_files_in_the_folder_and_beside_it(folder):
    result = json.dumps({**perplexity(folder), **ORIGIN})
    for place in (folder / "a.json", folder.parent / "b.json", folder.parent / "deeper/c.json", folder / "d.txt"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(result)
    os.mkfifo(folder.parent / "pipe.json")  # reading it would wait forever
    (folder.parent / "loop.json").symlink_to("loop.json")
    for name, text in (("broken", "{"), ("list", "[]"), ("deep", "[" * 100000), ("other", '{"a": 1}')):
        (folder.parent / f"{name}.json").write_text(text)
    assert len(results_of(folder).sections) == 2


def test_of_many_files_the_newest_are_read(folder, monkeypatch):
    monkeypatch.setattr("component.card.result.MOST_FILES", 2)
    for age, name in enumerate("cab"):
        file = folder.parent / f"{name}.json"
        file.write_text(json.dumps({**perplexity(folder, data_path=name), **ORIGIN}))
        os.utime(file, (2e9 - age, 2e9 - age))
    found = [section.splitlines()[0] for section in results_of(folder).sections]
    assert found == ["### Perplexity of `a`", "### Perplexity of `c`"]


def test_a_file_that_is_removed_meanwhile(folder, monkeypatch):
    """A card is written at the end of a run, while others go on beside it."""
    (folder.parent / "a.json").write_text(json.dumps({**perplexity(folder), **ORIGIN}))
    (folder.parent / "b.json").write_text("{}")
    is_file = Path.is_file

    def removed_after(file):
        found = is_file(file)
        if file.name == "b.json":
            file.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", removed_after)
    assert len(results_of(folder).sections) == 1


def test_results_of_earlier_weights(folder):
    file = folder.parent / "result.json"
    file.write_text(json.dumps({**perplexity(folder), **ORIGIN}))
    os.utime(file, (1e9 - 1, 1e9 - 1))
    found = results_of(folder)
    assert (found.sections, found.outdated) == ([], [file])
    os.utime(file, (1e9 + 1, 1e9 + 1))
    assert len(results_of(folder).sections) == 1
    (folder / "config.json").write_text("{}")
    assert results_of(folder).outdated == [file], "other positions are another model"


def test_a_newer_file_about_another_adapter_of_the_same_name(folder):
    """A copy of an older result, which says what it was measured with."""
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    os.utime(folder / "adapter_model.safetensors", (1e9, 1e9))
    file = folder.parent / "result.json"
    asked = {"base_model": None, "peft_model": str(folder), "samples": 20, "template": "completion"}
    result = {**SETTING, **ORIGIN, "lengths": [4096], "tasks": ["vt"], "scores": [[1.0]], "means": [1.0]}
    for sha, is_known in ((hashlib.sha256(b"weights").hexdigest(), True), ("0" * 64, False), (None, True)):
        file.write_text(json.dumps({**result, "asked": {**asked, "adapter_sha256": sha}}))
        found = results_of(folder)
        assert (len(found.sections), found.outdated) == ((1, []) if is_known else (0, [file]))


def test_held_out_data_of_the_run(folder):
    held_out = {"eval_loss": 2.0, "eval_perplexity": 7.38906}
    for place in (folder, folder.parent):  # the second is another run's
        (place / "eval_results.json").write_text(json.dumps(held_out))
    (found,) = results_of(folder).sections
    assert found.endswith("full attention, all tokens weighted equally: perplexity 7.389.")
