"""Models are written tensor by tensor, in shards that the libraries read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from component.error import UserError
from component.storage.tensor_reader import NAMES, model_tensors
from component.storage.tensor_writer import shard_bytes, write_model

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


# ---- writing


def written(folder: Path, tensors: dict[str, torch.Tensor], size: int) -> list[str]:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_model(folder, layout, tensors.__getitem__, max_shard_bytes=size)


def test_one_file(tmp_path):
    tensors = some_tensors()
    told: list[int] = []
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    names = write_model(tmp_path, layout, tensors.__getitem__, max_shard_bytes=10**9, progress=told.append)
    assert names == ["model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == names
    same(load_file(tmp_path / "model.safetensors"), tensors)
    assert sum(told) == sum(tensor.nbytes for tensor in tensors.values())
    start = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert start % 8 == 0


def test_shards(tmp_path):
    """As full as they may be, in order; a tensor that is larger than a shard is one by itself."""
    tensors = {name: torch.randn(size) for name, size in (("a", 20), ("b", 20), ("c", 21), ("d", 100), ("e", 1))}
    files = written(tmp_path, tensors, 160)
    shards = [f"model-0000{at}-of-00004.safetensors" for at in (1, 2, 3, 4)]
    assert files == [*shards, "model.safetensors.index.json"]
    assert [list(load_file(tmp_path / shard)) for shard in shards] == [["a", "b"], ["c"], ["d"], ["e"]]
    index = json.loads((tmp_path / files[-1]).read_text())
    assert index["metadata"] == {"total_parameters": 162, "total_size": 648}
    assert index["weight_map"] == dict(zip("abcde", [shards[at] for at in (0, 0, 1, 2, 3)], strict=True))
    same({name: stored.read() for name, stored in model_tensors(str(tmp_path)).items()}, tensors)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5 kb", 1500), ("4096", 4096)],
)
def test_sizes(text, size):
    assert shard_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5TB5", "1.2.3MB", "5 apples"])
def test_no_sizes(text):
    with pytest.raises(UserError, match="--max_shard_size"):
        shard_bytes(text)
