"""Is what lies under a name still what it was? Resumed work must not mix two models or texts in silence."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

WEIGHTS = (".safetensors", ".bin")
CONFIGS = ("config.json", "adapter_config.json")  # of models and adapters: positions and scales change with them
ANSWERING = (  # on which its answers depend besides
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    "generation_config.json",
)
BLOCKS, BLOCK = 64, 2**16  # samples of a file, and bytes of one


def fingerprint(name: str | Path | None, *, weights_alone: bool = False) -> str | None:
    """Hash of a file, or of the files of a model or adapter in a folder; None where there are none.

    Of files above 4 MiB (BLOCKS * BLOCK) it reads the size and BLOCKS evenly spaced samples, since hashing a 7B whole
    takes half a minute and training changes every weight: a change of a few bytes may be missed.

    Args:
        name: a path, or the hub id of a model that the local cache holds: then its commit is hashed.
        weights_alone: without a model's config and tokenizer.
    """
    if name is None:
        return None
    path, total, count = Path(name), hashlib.sha256(), 0
    if not path.exists():
        return _commit(str(name))
    for label, file in _files(path, weights_alone):
        total.update(f"{label} {file.stat().st_size}\n".encode())
        for block in _samples(file):
            total.update(block)
        count += 1
    return total.hexdigest() if count else None


def _commit(hub_id: str) -> str | None:
    """Of the snapshot in the cache, which files may still be added to."""
    for config in CONFIGS if hub_id.count("/") < 2 else ():
        if isinstance(cached := try_to_load_from_cache(hub_id, config), str):
            return hashlib.sha256(f"{hub_id} {Path(cached).parent.name}".encode()).hexdigest()
    return None


def _files(path: Path, weights_alone: bool) -> Iterator[tuple[str, Path]]:
    """(name within its folder, file), in alphabetical order."""
    if path.is_file():
        yield "", path
        return
    named = () if weights_alone else (*CONFIGS, *ANSWERING)
    for file in sorted(path.glob("*")):
        if file.is_file() and (file.suffix in WEIGHTS or file.name in named):
            yield file.name, file


def _samples(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= BLOCKS * BLOCK:
            yield stream.read()
            return
        for at in range(BLOCKS):
            stream.seek((size - BLOCK) * at // (BLOCKS - 1))
            yield stream.read(BLOCK)
