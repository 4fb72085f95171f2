"""How is read what somebody else wrote? Every program reads models, adapters and tokenizers of others through here."""

import errno
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from component.error import UserError

MAX_JSON_BYTES = 64 * 2**20  # the weight index of the largest models has some MB


@contextmanager
def reading(problem: str, cure: str) -> Iterator[None]:
    """Whatever a library raises on a file becomes `problem (reason); cure`: its types of errors are no contract.

    Full disks and GPUs are not the file's fault, and pass.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of tokenizers and safetensors, written in Rust
        is_full = "out of memory" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, UserError) or is_full or not (isinstance(error, Exception) or is_panic):
            raise
        raise UserError(f"{problem} ({_reason(error)}); {cure}") from error


def _reason(error: BaseException) -> str:
    """A library's message on one line, without advice to run the folder's code."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it requires trust_remote_code, which is not supported"
    if "weights_only" in text:
        return "its pickle holds more than tensors, which could run code"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    is_plain = text and isinstance(error, (OSError, ValueError, RuntimeError))
    return (text if is_plain else f"{type(error).__name__}: {text}")[:300]


def read_object(
    file: Path, problem: str = "is not valid JSON", cure: str = "download or create it again"
) -> dict[str, Any]:
    """The object in a JSON file, with finite numbers only.

    Raises:
        UserError: anything else.
    """
    with reading(f"{file} {problem}", cure):
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {file.stat().st_size:,} bytes, more than {MAX_JSON_BYTES:,}")
        text = file.read_text(encoding="utf-8")
        found = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)
