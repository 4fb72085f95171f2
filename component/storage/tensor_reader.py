"""Where are a model's tensors stored, and how is one read?

A `TensorRef` is a tensor in a file, with dtype and shape, not yet read. It is read with plain reads: pages of a
memory-mapped file would count as resident memory until the system reclaims them.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch

from component.error import UserError
from component.storage.foreign import read_object, reading
from component.storage.hub import fetch

MAX_HEADER_BYTES = 100 * 10**6  # as in the safetensors format

NAMES = {  # in the safetensors format
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int | None = None  # offset in the file in bytes; None in a .bin file

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def on_meta(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def expect(self) -> None:
        """Prefetch it from disk while other tensors are processed."""
        if self.start is not None and hasattr(os, "posix_fadvise"):
            with self.file.open("rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), self.start, self.size, os.POSIX_FADV_WILLNEED)

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """A copy, in new memory or in the bytes `into`; nothing else of the file stays in memory."""
        values = torch.empty(self.size, dtype=torch.uint8) if into is None else into
        if self.start is None:
            tensor = values.view(self.dtype).reshape(self.shape)
            return tensor.copy_(_unpickled(self.file)[self.name])
        view, done = memoryview(values.numpy()), 0
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start)
            while done < self.size:
                count = stream.readinto(view[done:])  # Linux reads at most 2 GiB at once
                if not count:
                    raise UserError(f"{self.file} is damaged: it ends inside {self.name}; download it again")
                done += count
        return values.view(self.dtype).reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """A copy of the rows `start` to `stop`, exclusive."""
        if self.start is None:
            return _unpickled(self.file)[self.name][start:stop].clone()
        first = self.start + start * self.size // self.shape[0]
        return dataclasses.replace(self, shape=(stop - start, *self.shape[1:]), start=first).read()


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN; several times faster than `isfinite().all()`."""
    if not values.is_floating_point() or not values.numel():
        return True
    values = values.float() if values.dtype.itemsize == 1 else values
    return all(bool(bound.isfinite()) for bound in values.aminmax())


def tensors_in(file: Path) -> dict[str, TensorRef]:
    """The tensors of a .safetensors or .bin file; no code in it runs.

    Raises:
        UserError: the file is damaged or holds anything but named tensors.
    """
    if file.suffix != ".safetensors":
        return {
            name: TensorRef(file, name, tensor.dtype, tuple(tensor.shape)) for name, tensor in _unpickled(file).items()
        }
    with reading(*_damaged(file)):
        return dict(_read_header(file))


def _damaged(file: Path) -> tuple[str, str]:
    return f"{file} is damaged or holds more than weights", "download or train it again"


def _read_header(file: Path) -> Iterator[tuple[str, TensorRef]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError("its header is truncated")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    place = 0  # tensors follow each other without gaps
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if any(type(number) is not int or number < 0 for number in (*shape, first, last)):
            raise ValueError(f"{name} has the shape {list(shape)} at bytes {first} to {last}")
        stored = TensorRef(file, name, NAMES[entry["dtype"]], shape, 8 + length + first)
        if first != place or last - first != stored.size or 8 + length + last > size:
            raise ValueError(f"{name} lies outside of the file, or where another tensor is")
        place = last
        yield name, stored


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file."""
    if file.suffix == ".safetensors":
        return {name: stored.read() for name, stored in tensors_in(file).items()}
    return {name: tensor.clone() for name, tensor in _unpickled(file).items()}


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin file, memory-mapped; weights-only unpickling runs no code."""
    load = functools.partial(torch.load, file, map_location="cpu", weights_only=True)
    with reading(*_damaged(file)):
        try:
            weights = load(mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            weights = load()  # the format of PyTorch before 1.6
        except UnpicklingError as error:
            if "weights_only" not in str(error):
                raise
            raise ValueError("it would run code") from error  # torch advises to unpickle it anyway
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{file} holds something other than named weights; use the file that training wrote")
    if any(not isinstance(name, str) or value.layout != torch.strided for name, value in weights.items()):
        raise UserError(f"{file} holds weights without a name, or sparse ones; use the file that training wrote")
    return weights


def model_tensors(model_name_or_path: str, field: str = "model_name_or_path") -> dict[str, TensorRef]:
    """The tensors of a model folder or hub id, in the order of the files.

    Raises:
        UserError: no weights, or damaged ones.
    """
    source = f"{field}: the weights of {model_name_or_path!r} do not load"
    for name in MODEL_FILES:
        file = fetch(model_name_or_path, name)
        if file is None:
            continue
        try:
            return _sharded(model_name_or_path, file) if file.suffix == ".json" else tensors_in(file)
        except UserError as error:
            raise UserError(f"{source} ({error})") from error
    if fetch(model_name_or_path, "adapter_config.json"):
        raise UserError(
            f"{field}: {model_name_or_path!r} is an adapter, not a model; merge it with script/merge_lora.py, or name "
            "its base"
        )
    raise UserError(f"{source}: it has none of {', '.join(MODEL_FILES)}; name a folder with weights")


def _sharded(model_name_or_path: str, index: Path) -> dict[str, TensorRef]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise UserError(f"{index}: weight_map does not name a file for each weight; download it again")
    found: dict[str, TensorRef] = {}
    for shard in sorted(set(places.values())):
        file = fetch(model_name_or_path, shard)
        if file is None:
            raise UserError(f"{shard} is missing; download it again")
        found |= {name: stored for name, stored in tensors_in(file).items() if places.get(name) == shard}
    absent = sorted(places.keys() - found.keys())
    if absent:
        raise UserError(f"{places[absent[0]]} lacks {absent[0]}; download it again")
    return found
