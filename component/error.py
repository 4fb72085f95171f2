"""What does the user see when something is wrong? One sentence, never a traceback.

A `UserError` names the field (or the file and line), the value and the cure. Anything else that is raised is a
defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something a YAML, a flag, a data file or a folder got wrong."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean x?)' for the known name that looks most like `name`, or the empty string."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def first_line(error: BaseException) -> str:
    """A library's complaint without the pages that follow, and without its advice to run foreign code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is never run here"
    return lines[0]
