"""How are prompts read from a terminal or a pipe? Lines with editing and history, or all of standard input."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from component.error import UserError

HISTORY_LINES = 1000


def prompts(banner: str) -> Iterator[str]:
    """Yield the lines of standard input that are not blank, until its end or /exit; `banner` prompts for each.

    At a terminal, Ctrl-C only clears the line: it may have been meant for an answer that had just ended.

    Raises:
        UserError: a line that cannot be decoded.
    """
    while True:
        try:
            with readable_input():
                line = input(banner)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(/exit or Ctrl-D quits)", file=sys.stderr, flush=True)
            continue
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line


def history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "longqlora" / "history"


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Line editing and a persistent history, if standard input is a terminal and Python has readline."""
    try:
        import readline
    except ImportError:  # Windows
        readline = None  # type: ignore[assignment]
    if readline is None or not sys.stdin.isatty():
        yield
        return
    file = history_file()
    with contextlib.suppress(OSError):  # chat works without a history
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)  # prompts are private
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(file)


def read_input() -> str | None:
    """All of standard input if it is not a terminal; None to prompt at the terminal."""
    if sys.stdin.isatty():
        return None
    with readable_input():
        return sys.stdin.read()


@contextlib.contextmanager
def readable_input() -> Iterator[None]:
    """Turn decoding errors of standard input into a UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not {error.encoding.upper()} ({error.reason}); convert it") from error
