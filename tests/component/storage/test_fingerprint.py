"""A fingerprint changes with what lies under a name, and with nothing else."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from component.storage.fingerprint import BLOCK, BLOCKS, fingerprint


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_weights(folder, 0)
    return folder


def write_weights(folder: Path, seed: int) -> None:
    weights = torch.randn(2 * BLOCKS * BLOCK // 4, generator=torch.Generator().manual_seed(seed))
    save_file({"weight": weights}, folder / "model.safetensors")


def test_of_a_model(model, tmp_path):
    first = fingerprint(model)
    assert fingerprint(str(shutil.copytree(model, tmp_path / "moved"))) == first
    (model / "README.md").write_text("notes")
    (model / "checkpoint-3").mkdir()
    (model / "checkpoint-3/model.safetensors").write_bytes(b"1")
    assert fingerprint(model) == first
    write_weights(model, 1)
    second = fingerprint(model)
    assert second != first
    (model / "config.json").write_text('{"rope_theta": 1e6}')
    assert fingerprint(model) not in (first, second)
    assert fingerprint(model, weights_alone=True) != fingerprint(tmp_path / "moved", weights_alone=True)
    write_weights(model, 0)
    assert fingerprint(model, weights_alone=True) == fingerprint(tmp_path / "moved", weights_alone=True)
    (model / "config.json").write_text("{}")
    assert fingerprint(model) == first
    for name in ("tokenizer.json", "chat_template.jinja", "adapter_config.json", "generation_config.json"):
        (model / name).write_text("{}")
        assert fingerprint(model) != first
        (model / name).unlink()


def test_of_a_model_in_the_hubs_cache(tmp_path, monkeypatch):
    """Its commit: files of it may still be downloaded."""
    snapshot = tmp_path / "abc"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    found = {"config.json": str(snapshot / "config.json")}
    monkeypatch.setattr("component.storage.fingerprint.try_to_load_from_cache", lambda _, name: found.get(name))
    first = fingerprint("owner/model")
    write_weights(snapshot, 0)
    assert fingerprint("owner/model") == first
    found["config.json"] = str(snapshot.rename(tmp_path / "def") / "config.json")
    assert fingerprint("owner/model") not in (None, first)


def test_of_a_file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("one")
    first = fingerprint(file)
    file.write_text("two")
    assert fingerprint(file) != first
    file.write_text("one")
    assert fingerprint(file.rename(tmp_path / "b.jsonl")) == first, "the name of a file is not its content"


@pytest.mark.parametrize("at", [0, BLOCKS * BLOCK // 2, BLOCKS * BLOCK - 1])
def test_every_byte_of_a_short_file_counts(at, tmp_path):
    content = bytearray(BLOCKS * BLOCK)
    (tmp_path / "a").write_bytes(content)
    first = fingerprint(tmp_path / "a")
    content[at] = 1
    (tmp_path / "a").write_bytes(content)
    assert fingerprint(tmp_path / "a") != first


def test_both_ends_of_a_long_file_count(tmp_path):
    size, found = 3 * BLOCKS * BLOCK + 7, set()
    for at in (None, 0, size - 1):
        content = bytearray(size)
        if at is not None:
            content[at] = 1
        (tmp_path / "a").write_bytes(content)
        found.add(fingerprint(tmp_path / "a"))
    assert len(found) == 3


def test_of_nothing(tmp_path):
    assert fingerprint(None) is None
    assert fingerprint(tmp_path / "none") is None
    assert fingerprint(tmp_path) is None
    assert fingerprint("owner/no-such-model") is None
    assert fingerprint("owner/texts/a.jsonl") is None
