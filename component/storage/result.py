"""How is a measurement stored? As JSON or a figure, written atomically, with command, hardware, versions and date."""

import contextlib
import importlib.metadata
import json
import math
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from component.error import UserError
from component.storage.atomic import atomic_file

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "accelerate")


def origin() -> dict[str, Any]:
    """The command, hardware, versions and date of a result."""
    return {"command": command(), "hardware": hardware(), "date": str(date.today()), "versions": library_versions()}


def library_versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Versions of the installed packages among `names`, without importing them."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def command() -> str:
    """The command line, to be run again from the repository's root."""
    script = Path(sys.argv[0]).absolute()
    root = Path(__file__).resolve().parents[2]
    name = str(script.relative_to(root)) if script.is_relative_to(root) else script.name
    return shlex.join(["python", name, *sys.argv[1:]])


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")  # Linux
    names = re.findall(r"model name\s*: (.+)", information.read_text()) if information.is_file() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Write `record` atomically, with innermost lists and objects on one line each.

    Infinities and NaN become null, as JSON has neither.

    Raises:
        UserError: the file can't be written; what was measured is printed instead, so that it is not lost.
    """
    text = json.dumps(_finite(record), indent=2, allow_nan=False)
    # line breaks inside strings are escaped: those found here are layout
    text = re.sub(r"[\[{]\n[^\[\]{}]*[\]}]", lambda found: re.sub(r"\n\s*", " ", found[0]), text)
    try:
        with atomic_file(path) as writing:
            writing.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        print(text, flush=True)
        reason = f"{path} can't be written ({error.strerror})"
        raise UserError(f"{reason}; its content is printed above, so copy it to a file elsewhere") from error


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    with atomic_file(path) as writing:
        figure.savefig(writing, dpi=130, format="png")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
