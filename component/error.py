"""What does the user see when something is wrong? One message without a traceback.

A `UserError` names the field (or the file and line), the value and the cure. Any other exception is a bug of ours and
keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_MESSAGE = 4000  # characters


class UserError(ValueError):
    """A mistake in a YAML, a flag, a data file or a folder."""

    def __init__(self, message: str):
        super().__init__(printable(message, LONGEST_MESSAGE))


class OneProcessError(UserError):
    """One that a single process of a run has found, which must tell it."""


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Put `field` in front of a `UserError` that does not begin with it."""
    try:
        yield
    except UserError as error:
        raise error if str(error).startswith(f"{field}:") else UserError(f"{field}: {error}") from error


def printable(text: str, longest: int) -> str:
    """`text` for a terminal: what files hold may be megabytes, and control characters would act on it."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} [... {len(text) - longest:,} characters ...] {text[-(longest // 2) :]}"
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean x?)' for the known name most similar to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, without advice to enable `trust_remote_code`."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "trust_remote_code" in str(error):
        return "it requires trust_remote_code, which is not supported"
    return lines[0]
