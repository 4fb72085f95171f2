"""Which base, and which license of it, may a model card name? Only what is known on this machine; no network."""

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id

from component.checkpoint import CARD_FILE, RECORD_FILE, read_json
from component.error import UserError
from component.storage.hub import PART, fetch

MOST_BASES = 8  # in a line of models that were each trained from the one before
LARGEST_CARD = 2**22  # bytes
TERM = r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,60}"  # of the hub's license ids and license names
LINK = r"https://[A-Za-z0-9./_~%+-]{1,200}"


class License(NamedTuple):
    """What the card of a base says about its license, and the name of that base."""

    base: str
    fields: dict[str, str]  # license, license_name, license_link


def hub_id(name: Any) -> str | None:
    """`name`, if it is written as owner/name on the hub: folders are recorded by their absolute path."""
    if not isinstance(name, str) or not re.fullmatch(f"{PART}/{PART}", name, re.ASCII):
        return None
    try:
        validate_repo_id(name)
    except ValueError:
        return None
    return name


def display_name(base: str) -> str:
    """A hub id as it is; of a folder only its name."""
    return hub_id(base) or Path(base).name or "?"


def bases_of(record: dict[str, Any]) -> list[str]:
    """The base that a record names, the base of that one if it was merged by this project and is here, and so on."""
    found: list[str] = []
    base = record.get("base_model")
    while isinstance(base, str) and base and base not in found and len(found) < MOST_BASES:
        found.append(base)
        before = read_json(Path(base) / RECORD_FILE) if hub_id(base) is None else {}
        base = before.get("base_model") if "merged_from" in before else None
    return found


def license_of(bases: list[str]) -> License | None:
    """The license that the first of `bases` with one states in the front matter of its own card; None if unknown."""
    for base in bases:
        stated = _front_matter(base)
        name = stated.get("license")
        if not isinstance(name, str) or not re.fullmatch(TERM, name):
            continue
        fields = {"license": name}
        for key, pattern in (("license_name", TERM), ("license_link", LINK)):
            if isinstance(stated.get(key), str) and re.fullmatch(pattern, stated[key]):
                fields[key] = stated[key]
        return License(display_name(base), fields)
    return None


def _front_matter(base: str) -> dict[str, Any]:
    """That of the card in a folder or in the hub's local cache; empty if there is none, or it can't be read."""
    file: Any = None
    with contextlib.suppress(UserError, OSError, ValueError):
        file = (
            try_to_load_from_cache(base, CARD_FILE) if hub_id(base) else Path(base).is_dir() and fetch(base, CARD_FILE)
        )
    if not isinstance(file, str | Path) or Path(file).stat().st_size > LARGEST_CARD:
        return {}
    try:
        return ModelCard.load(Path(file), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # of YAML and of its content; a stranger's card is no reason to fail
        return {}
