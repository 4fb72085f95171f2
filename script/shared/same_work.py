"""Is what a work folder holds of the same flags, model and texts as now? Else it would be taken for theirs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from component.checkpoint import read_json
from component.error import UserError
from component.storage.fingerprint import fingerprint

CONTENT = "content"  # key of the fingerprints, by what they are of


def same_work(record: Path, flags: dict[str, Any], files: Mapping[str, str | Path]) -> dict[str, Any]:
    """What to write into `record`, a JSON file of the work folder.

    Args:
        flags: that decide what is in the folder, by name.
        files: the model and the texts that it is made of, by what to call them.

    Raises:
        UserError: which flags differ from what `record` holds, or which files do.
    """
    then = read_json(record)
    content = {name: fingerprint(file) for name, file in files.items()}
    before: dict[str, Any] = then.get(CONTENT, content)  # older versions have none
    names = {**content, **before}
    if others := [name for name in names if before.get(name) != content.get(name)]:
        raise UserError(f"--work: {', '.join(others)} changed since {record.parent} was begun; use another --work")
    changed = {name: (then[name], now) for name, now in flags.items() if name in then and then[name] != now}
    if changed:
        told = "; ".join(f"--{name}: {new}, but it was {old}" for name, (old, new) in changed.items())
        raise UserError(f"{told} for what is in {record.parent}; use the same flags, or another --work")
    return flags | {CONTENT: content}
