"""Which files do a folder or a hub id and a name mean?

The hub is asked only where a name can't be a mistyped path: asking takes half a minute without a network. What a
folder says never leads out of it.
"""

import re
from pathlib import Path, PurePath

from huggingface_hub import try_to_load_from_cache
from transformers.utils import cached_file

from component.error import UserError
from component.storage.foreign import reading

READ_SUFFIXES = (".json", ".model", ".safetensors", ".bin", ".txt", ".jinja", ".tiktoken")
TEMPLATE_FOLDER = "additional_chat_templates"  # of a tokenizer
PART = r"[A-Za-z0-9][\w.-]*"


def check_source(name: str, field: str, what: str = "model folder") -> None:
    """Refuse what is neither a folder nor may be a hub id (`owner/name`, or an old one: `gpt2`).

    Args:
        what: is wanted, for the message.
    """
    path = Path(name)
    if path.is_file():
        raise UserError(f"{field}: {name} is a file; name the {what}, or a hub id such as owner/name")
    if path.exists():
        return
    if not re.fullmatch(f"{PART}(/{PART})?", name):
        raise UserError(f"{field}: there is no {what} {name!r}; name one, or a hub id such as owner/name")
    if "/" in name and path.parent.is_dir() and not is_downloaded(name):
        raise UserError(
            f"{field}: there is no {what} {name!r} in the folder {path.parent}; name one, or, for a hub id, "
            f"download it: hf download {name} --local-dir {name}"
        )


def is_downloaded(name: str) -> bool:
    """Whether the hub's local cache has this model or adapter."""
    files = ("config.json", "adapter_config.json", "tokenizer_config.json")
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def fetch(source: str, name: str) -> Path | None:
    """A file of a model or adapter, a folder or hub id; None if it has no such file.

    Raises:
        UserError: there is no such model, the file can't be read, or its name or a link leads out of the folder.
    """
    if Path(source).is_dir():
        return _inside(Path(source), name)
    _check_name(source, name)
    with reading(f"{name} of {source!r} can't be read", "name a folder, or check the hub id and the network"):
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    # a file that the hub has said it lacks is known to the cache too
    if not file and try_to_load_from_cache(source, name) is None and not is_downloaded(source):
        raise UserError(
            f"there is no folder {source!r}, nor is such a model or adapter in the hub's cache, and the hub can't be "
            "asked (no network, or HF_HUB_OFFLINE); check the name, or download it: "
            f"hf download {source} --local-dir {source}"
        )
    return Path(file) if file else None


def check_links(source: str) -> None:
    """Refuse a folder with links to files outside of it: they would be read, and copied into results.

    Raises:
        UserError: there is one among the files that transformers or PEFT may read.
    """
    folder = Path(source)
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.suffix in READ_SUFFIXES or entry.name == TEMPLATE_FOLDER:
            _inside(folder, entry.name)
    for entry in (folder / TEMPLATE_FOLDER).glob("*.jinja"):
        _inside(folder, f"{TEMPLATE_FOLDER}/{entry.name}")


def _check_name(source: str, name: str) -> None:
    if (
        not isinstance(name, str)
        or not name
        or PurePath(name).is_absolute()
        or re.search(r"(^|[/\\])\.\.([/\\]|$)", name)
    ):
        raise UserError(f"{source} names {name!r} as one of its files, which leads out of it; do not use it")


def _inside(folder: Path, name: str) -> Path | None:
    _check_name(str(folder), name)
    file, home = folder / name, folder.resolve()
    if not file.exists():
        return None
    places = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]  # as in the hub's cache
    if not any(file.resolve().is_relative_to(place) for place in places):
        raise UserError(
            f"{file} is a link to {file.resolve()}, outside of the folder; if you trust it, put a copy in its place"
        )
    return file if file.is_file() else None
