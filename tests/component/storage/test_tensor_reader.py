"""Tensors are read one at a time as the libraries read them all."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from component.error import UserError
from component.storage.tensor_reader import NAMES, model_tensors, tensors_in
from component.storage.tensor_writer import write_model

SHAPES = [(3, 5), (7,), (), (0, 4), (2, 3, 4)]


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        f"{name}{len(shape)}.{at}": (torch.randn(shape) * 9).to(dtype)
        for name, dtype in NAMES.items()
        for at, shape in enumerate(SHAPES)
    }


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        flat = [value.contiguous().reshape(-1).view(torch.uint8) for value in (ours[name], tensor)]
        assert torch.equal(*flat), name


def test_safetensors_of_every_type_and_shape(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt", "who": "they"})
    found = tensors_in(tmp_path / "file.safetensors")
    same({name: stored.read() for name, stored in found.items()}, tensors)
    assert all(stored.on_meta().shape == tensors[name].shape for name, stored in found.items())


@pytest.mark.parametrize("is_new", [True, False])
def test_bin_files(tmp_path, is_new):
    """Views of one storage and transposed ones are what they are, whatever lies behind them."""
    large = torch.randn(6, 8)
    tensors = {"rows": large[2:4], "columns": large[:, 1:3], "turned": large.t(), "half": large.half()}
    torch.save(tensors, tmp_path / "file.bin", _use_new_zipfile_serialization=is_new)
    read = {name: stored.read() for name, stored in tensors_in(tmp_path / "file.bin").items()}
    same(read, tensors)
    assert all(tensor.is_contiguous() for tensor in read.values())


def test_some_rows(tmp_path):
    weight = torch.arange(24.0).reshape(4, 3, 2)
    save_file({"other": torch.ones(5), "weight": weight}, tmp_path / "file.safetensors")
    torch.save({"weight": weight}, tmp_path / "file.bin")
    for file in tmp_path.iterdir():
        assert torch.equal(tensors_in(file)["weight"].read_rows(1, 3), weight[1:3])
        assert torch.equal(tensors_in(file)["weight"].read_rows(3, 4), weight[3:])


def test_reading_into_given_memory(tmp_path):
    save_file({"weight": torch.arange(6.0).reshape(2, 3)}, tmp_path / "file.safetensors")
    torch.save({"weight": torch.arange(6.0).reshape(2, 3)}, tmp_path / "file.bin")
    for file in tmp_path.iterdir():
        room = torch.zeros(24, dtype=torch.uint8)
        read = tensors_in(file)["weight"].read(room)
        assert read.data_ptr() == room.data_ptr()
        assert torch.equal(room.view(torch.float32), torch.arange(6.0))


def header(change) -> bytes:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    text = json.dumps({"weight": {**entry, **change}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(24)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00\xff" * 40, header({})[:-1], header({"dtype": "F33"}), header({"shape": [2, 4]}),
     header({"data_offsets": [-4, 20]}), header({"data_offsets": [8, 32]}), header({"data_offsets": None}),
     b"\x02" + bytes(7) + b"[]"],
)  # fmt: skip
def test_damaged_safetensors(tmp_path, data):
    (tmp_path / "file.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"file\.safetensors is damaged"):
        tensors_in(tmp_path / "file.safetensors")


def two_tensors(first: dict, second: dict) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", **first}, "b": {"dtype": "F32", **second}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(24)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"shape": [3], "data_offsets": [0, 12]}, {"shape": [3], "data_offsets": [8, 20]}),
        ({"shape": [6], "data_offsets": [0, 24]}, {"shape": [6], "data_offsets": [0, 24]}),
        ({"shape": [2], "data_offsets": [0, 8]}, {"shape": [2], "data_offsets": [16, 24]}),
        ({"shape": [-3, -1], "data_offsets": [0, 12]}, {"shape": [3], "data_offsets": [12, 24]}),
        ({"shape": [3], "data_offsets": [0, 12]}, {"shape": [4], "data_offsets": [12, 28]}),
        ({"shape": [3.0], "data_offsets": [0, 12]}, {"shape": [3], "data_offsets": [12, 24]}),
        ({"shape": [True, 3], "data_offsets": [0, 12]}, {"shape": [3], "data_offsets": [12, 24]}),
        ({"shape": 3, "data_offsets": [0, 12]}, {"shape": [3], "data_offsets": [12, 24]}),
    ],
    ids=["overlap", "the same bytes", "a gap", "negative", "beyond the end", "floats", "booleans", "no list"],
)
def test_k15_places_of_tensors(tmp_path, first, second):
    (tmp_path / "file.safetensors").write_bytes(two_tensors(first, second))
    with pytest.raises(UserError, match=r"file\.safetensors is damaged"):
        tensors_in(tmp_path / "file.safetensors")


@pytest.mark.parametrize("weights", [{5: torch.ones(2)}, {"a": torch.ones(2).to_sparse()}, [torch.ones(2)]])
def test_k15_a_pickle_of_other_things(tmp_path, weights):
    torch.save(weights, tmp_path / "file.bin")
    with pytest.raises(UserError, match=r"file\.bin holds"):
        tensors_in(tmp_path / "file.bin")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"weight": torch.ones(1000)}, tmp_path / "file.safetensors")
    stored = tensors_in(tmp_path / "file.safetensors")["weight"]
    os.truncate(tmp_path / "file.safetensors", 2000)
    with pytest.raises(UserError, match="ends inside weight"):
        stored.read()


# ---- writing


def written(folder: Path, tensors: dict[str, torch.Tensor], size: int) -> list[str]:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_model(folder, layout, tensors.__getitem__, max_shard_bytes=size)


@pytest.mark.parametrize("what", ["gone", "without a tensor", "no index"])
def test_shards_that_are_not_whole(tmp_path, what):
    files = written(tmp_path, {"a": torch.ones(20), "b": torch.ones(20)}, 80)
    if what == "gone":
        (tmp_path / files[1]).unlink()
    elif what == "without a tensor":
        save_file({"c": torch.ones(2)}, tmp_path / files[1])
    else:
        (tmp_path / files[-1]).write_text("{}")
    with pytest.raises(UserError, match="model_name_or_path: the weights"):
        model_tensors(str(tmp_path))


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors"):
        model_tensors(str(tmp_path))
