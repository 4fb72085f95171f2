"""How is a model written without holding it in memory? To safetensors shards, one tensor at a time.

A safetensors header holds the offsets of all tensors; dtypes and shapes determine them.
"""

import json
import math
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from component.error import UserError
from component.storage.tensor_reader import NAMES

DTYPE_NAMES = {dtype: name for name, dtype in NAMES.items()}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def shard_bytes(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a plain number, in bytes.

    Raises:
        UserError: anything else, or less than a byte.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    try:
        size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"--max_shard_size: {text!r} is not a file size; use one like 5GB or 500MB")
    return size


def write_model(
    folder: Path,
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    produce: Callable[[str], torch.Tensor],
    *,
    max_shard_bytes: int,
    progress: Callable[[int], Any] = lambda size: None,
) -> list[str]:
    """Write `model.safetensors`, or shards and their index; returns the files' names.

    Args:
        layout: dtype and shape of each tensor, in the order of writing.
        produce: returns a tensor by name, called once for each while the one before is written; it may reuse the
            memory of the tensor before that.
        max_shard_bytes: of a file; a larger tensor gets its own file.
        progress: called with the bytes of each tensor written.
    """
    shards = _shards({name: _size(*of_tensor) for name, of_tensor in layout.items()}, max_shard_bytes)
    files = [f"model-{at:05}-of-{len(shards):05}.safetensors" for at in range(1, len(shards) + 1)]
    files = ["model.safetensors"] if len(shards) == 1 else files
    with ThreadPoolExecutor(1) as writer:
        for file, names in zip(files, shards, strict=True):
            with (folder / file).open("wb", buffering=0) as stream:
                _write_all(stream, _header({name: layout[name] for name in names}))
                under_way: Future | None = None
                for name in names:
                    tensor = produce(name)
                    assert (tensor.dtype, tuple(tensor.shape)) == layout[name], name
                    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                    if under_way:
                        under_way.result()
                    under_way = writer.submit(_write_all, stream, data)
                    progress(_size(*layout[name]))
                if under_way:
                    under_way.result()
    if len(shards) == 1:
        return files
    places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    metadata = {
        "total_parameters": sum(math.prod(shape) for _, shape in layout.values()),
        "total_size": sum(_size(*of_tensor) for of_tensor in layout.values()),
    }
    index = json.dumps({"metadata": metadata, "weight_map": dict(sorted(places.items()))}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
    return [*files, "model.safetensors.index.json"]


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _header(layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    place = 0
    for name, (dtype, shape) in layout.items():
        end = place + _size(dtype, shape)
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text


def _write_all(stream: Any, data: Any) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += stream.write(view[done:])  # Linux writes at most 2 GiB at once
