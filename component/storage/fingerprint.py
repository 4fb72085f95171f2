"""Is what lies under a name still what it was? Resumed measurements must not mix results of two models or texts."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

WEIGHTS = (".safetensors", ".bin")
CONFIG = "config.json"  # of a model: positions change with it
BLOCKS, BLOCK = 64, 2**16  # samples of a file, and bytes of one


def fingerprint(name: str | Path | None) -> str | None:
    """Hash of a file, or of a model's weights and config, or of all files of another folder; None where nothing is.

    Of files above 4 MiB (BLOCKS * BLOCK) it reads the size and BLOCKS evenly spaced samples, since hashing a 7B whole
    takes half a minute and training changes every weight: a change of a few bytes may be missed.

    Args:
        name: a path, or the hub id of a model that the local cache holds.
    """
    if name is None:
        return None
    total = hashlib.sha256()
    for label, file in _files(name):
        total.update(f"{label} {file.stat().st_size}\n".encode())
        for block in _samples(file):
            total.update(block)
    return total.hexdigest() if any(True for _ in _files(name)) else None


def _files(name: str | Path) -> Iterator[tuple[str, Path]]:
    """(name within its folder, file), in alphabetical order."""
    path = Path(name)
    if path.is_file():
        yield "", path
        return
    if not path.is_dir():
        cached = try_to_load_from_cache(str(name), CONFIG) if str(name).count("/") < 2 else None
        if not isinstance(cached, str):
            return
        path = Path(cached).parent
    is_model = (path / CONFIG).is_file()
    for file in sorted(path.glob("*") if is_model else path.rglob("*")):
        if file.is_file() and (not is_model or file.suffix in WEIGHTS or file.name == CONFIG):
            yield file.relative_to(path).as_posix(), file


def _samples(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= BLOCKS * BLOCK:
            yield stream.read()
            return
        for at in range(BLOCKS):
            stream.seek((size - BLOCK) * at // (BLOCKS - 1))
            yield stream.read(BLOCK)
