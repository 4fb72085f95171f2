"""Whatever the files of somebody's model, adapter or run hold: it is read, or one message says what is wrong.

As in test_fuzz.py: never another exception, a hang, or a file that is changed or gone.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from component.checkpoint import check_replaceable, checkpoint_to_resume, read_record, write_record
from component.loading import extended_config_of, resolve_model
from component.merge.plan import plan_merge
from component.storage.tensor_reader import read_weights
from component.tokenizer import load_tokenizer
from tests.fuzzing import damaged_bytes, damaged_json, examples, survives

WEIGHTS = "model.safetensors"
JSON_FILES = [
    "base/config.json",
    "base/generation_config.json",
    "base/tokenizer_config.json",
    "base/model.safetensors.index.json",
    "adapter/adapter_config.json",
    "adapter/config.json",
    "adapter/longqlora.json",
]
KEYS = (
    "rope_parameters",
    "rope_scaling",
    "quantization_config",
    "head_dim",
    "auto_map",
    "rank_pattern",
    "merged_from",
)


@pytest.fixture
def inputs(tmp_path, base_folder, adapter_folder, monkeypatch) -> Path:
    """A base in two shards, and an adapter that names it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "inputs"
    shutil.copytree(base_folder, folder / "base")
    shutil.copytree(adapter_folder, folder / "adapter")
    header = json.loads((folder / "base" / WEIGHTS).read_bytes()[8:].partition(b"}}")[0] + b"}}")
    names = [name for name in header if name != "__metadata__"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "base" / WEIGHTS).rename(folder / "base" / "model-00001-of-00001.safetensors")
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    rewrite_record(folder)
    return folder


def rewrite_record(folder: Path) -> None:
    """The record with the sizes of the files as they are now; damage to them is not told by their size."""
    record = json.loads((folder / "adapter" / "longqlora.json").read_text())
    write_record(folder / "adapter", record | {"base_model": str(folder / "base")})


def read_all(folder: Path) -> None:
    """What merging does before it writes, from base, adapter and record."""
    found = resolve_model(None, str(folder / "adapter"))
    config = extended_config_of(found.source, None, is_fixed=found.is_ours)
    load_tokenizer(found.base)
    plan_merge(found.base, str(folder / "adapter"), config, dtype=torch.float16)


@pytest.mark.parametrize("name", JSON_FILES)
def test_fuzz_json(name, inputs):
    valid = json.loads((inputs / name).read_text())
    record = (inputs / "adapter" / "longqlora.json").read_bytes()
    read_all(inputs)

    @examples(25)
    @given(content=damaged_json(valid, KEYS))
    def check(content):
        (inputs / "adapter" / "longqlora.json").write_bytes(record)
        (inputs / name).write_bytes(content)
        if not name.endswith("longqlora.json"):
            rewrite_record(inputs)
        survives(lambda: read_all(inputs), inputs)

    check()


def test_fuzz_records_of_runs(inputs):
    folder = inputs / "adapter"
    valid = json.loads((folder / "longqlora.json").read_text())

    @examples(40)
    @given(content=damaged_json(valid, KEYS))
    def check(content):
        (folder / "longqlora.json").write_bytes(content)
        for read in (
            lambda: read_record(folder),
            lambda: checkpoint_to_resume(str(inputs), str(folder)),
            lambda: check_replaceable(folder, "--save_path"),
        ):
            survives(read, inputs)

    check()


def test_fuzz_weights(inputs):
    file = inputs / "adapter" / "adapter_model.safetensors"
    valid = file.read_bytes()
    end = 8 + int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8:end])

    @examples(60)
    @given(data=st.data())
    def check(data):
        content = data.draw(damaged_json(header, KEYS))
        content = len(content).to_bytes(8, "little") + content + valid[end:]
        if not data.draw(st.integers(0, 2)):
            content = data.draw(damaged_bytes(valid))
        file.write_bytes(content)
        survives(lambda: read_weights(file), inputs)
        rewrite_record(inputs)
        survives(lambda: read_all(inputs), inputs)

    check()


def test_fuzz_pickles(inputs):
    file = inputs / "adapter" / "adapter_model.bin"
    torch.save(read_weights(file.with_suffix(".safetensors")), file)
    valid = file.read_bytes()

    @examples(30)
    @given(content=damaged_bytes(valid))
    def check(content):
        file.write_bytes(content)
        survives(lambda: read_weights(file), inputs)

    check()
