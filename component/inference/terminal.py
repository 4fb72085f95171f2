"""How do prompts come from a keyboard or a pipe? Lines with editing and history, or all of standard input."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from component.error import UserError
from component.inference.text_file import read_text_file

HISTORY_LINES = 1000


def prompts(banner: str) -> Iterator[str]:
    """Lines typed at a terminal after `banner`; until the end of input or /exit.

    Ctrl-C at the keyboard empties the line: it may have been meant for an answer that had just ended.

    Raises:
        UserError: a line that is no text.
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
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr, flush=True)
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
    """Arrow keys and the lines of earlier chats, where standard input is a terminal and Python has readline."""
    try:
        import readline
    except ImportError:  # Windows
        readline = None  # type: ignore[assignment]
    if readline is None or not sys.stdin.isatty():
        yield
        return
    file = history_file()
    with contextlib.suppress(OSError):  # a history that cannot be kept is no reason not to chat
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)  # what people type is theirs
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(file)


def read_prompt(path: str | None) -> str | None:
    """A text file's contents, or all of standard input when that is not a terminal; None to ask at the terminal."""
    if path is not None:
        return read_text_file(path, "--prompt_file")
    if sys.stdin.isatty():
        return None
    with readable_input():
        return sys.stdin.read()


@contextlib.contextmanager
def readable_input() -> Iterator[None]:
    """A message for the user who sends bytes that are no text."""
    try:
        yield
    except UnicodeDecodeError as error:
        spelling = error.encoding.upper()
        raise UserError(f"standard input: no {spelling} text ({error.reason}); convert it") from error
