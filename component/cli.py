"""How do all programs handle flags, user errors and Ctrl-C?"""

import argparse
import contextlib
import errno
import functools
import io
import logging
import os
import re
import select
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from component.error import LONGEST_MESSAGE, OneProcessError, UserError, printable

CURES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EROFS: "name another place",
    errno.EACCES: "change its permissions, or name another place",
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "check the path",
    errno.ENAMETOOLONG: "check the path",
}
LARGEST = 2**53  # a float has every integer up to here
Main = TypeVar("Main")


class _Quiet(io.StringIO):
    """Standard error under --quiet: discards what is written; `errors` is where errors still go."""

    def __init__(self, errors: Any) -> None:
        super().__init__()
        self.errors_to = errors

    def write(self, text: str) -> int:
        return len(text)


class _QuietAction(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: Any) -> None:
        setattr(namespace, self.dest, True)
        logging.disable(logging.WARNING)  # libraries' handlers have kept the real standard error
        warnings.simplefilter("ignore")
        sys.stderr = _Quiet(sys.stderr)


# for add_argument: notices, warnings and progress bars, all on standard error, are discarded from there on
QUIET: dict[str, Any] = {
    "action": _QuietAction,
    "nargs": 0,
    "default": False,
    "help": "print results and errors alone",
}


def show(text: str) -> None:
    """Print on standard error, also under --quiet."""
    print(text, file=getattr(sys.stderr, "errors_to", sys.stderr), flush=True)


def exit_on_user_error(main: Callable[[], Main]) -> Callable[[], Main]:
    """Decorate `main`: what a user or the disk caused is told in one message, with status 1.

    Ctrl-C ends with 130 and a closed pipe (`| head`) with 141, both quietly: the shell's 128 + signal.
    """

    @functools.wraps(main)
    def wrapper() -> Main:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # ASCII terminals, undecodable names
        try:
            try:
                sys.argv[1:] = map(with_home, map(_readable, sys.argv[1:]))
                return main()
            finally:
                sys.stdout.flush()  # at exit it would be too late to handle a closed pipe
        except UserError as error:
            # one message, not one per GPU
            if int(os.environ.get("LOCAL_RANK", "0")) == 0 or isinstance(error, OneProcessError):
                show(f"error: {error}")
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _is_output_closed():
                sys.exit(128 + signal.SIGPIPE)
            message = _disk_problem(error)
            if message is None:
                raise
            show(f"error: {message}")
            sys.exit(1)
        finally:
            if isinstance(sys.stderr, _Quiet):  # a traceback is shown
                sys.stderr = sys.stderr.errors_to
                logging.disable(logging.NOTSET)

    return wrapper


def parsed_first(parse: Callable[[], Main]) -> Callable[[], Main]:
    """Decorate a program's `parse_flags`, which stands above its slow imports.

    If the program is run, and not imported, flags are parsed right there: --help and mistakes need no torch.
    """
    if parse.__module__ == "__main__":
        exit_on_user_error(parse)()
    return parse


def _readable(word: str) -> str:
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{word!r} is not UTF-8; rename the file, or set LANG to its encoding") from error
    return word


def with_home(word: str) -> str:
    """`~/x`, `--flag=~/x` and `NAME=~/x:~/y` with the home folder; the shell replaces only the first of them."""
    is_text = any(character.isspace() for character in word)
    return word if is_text else re.sub(r"(^|[=:])~(?=/|$)", lambda found: f"{found[1]}{Path.home()}", word)


def _is_output_closed() -> bool:
    """Whether nobody reads stdout; what is left for it is then discarded, else Python complains at exit."""
    with contextlib.suppress(io.UnsupportedOperation):  # a stdout of a test has no descriptor
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if poll.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return True
    return False


def _disk_problem(error: Exception) -> str | None:
    """The operating system's refusal with its file and a cure; None for any other exception."""
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors and tokenizers are written in Rust
        number = int(found[1])
    if number not in CURES:
        return None
    file = getattr(error, "filename", None) or "a file can't be written"
    return printable(f"{file}: {os.strerror(number)}; {CURES[number]}", LONGEST_MESSAGE)


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of flags whose --help shows `description` as it is written, and whose integers have bounds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.register("type", int, _integer)
    return parser


def _integer(text: str) -> int:
    """An integer that floats and the sizes of arrays can hold."""
    if abs(number := int(text)) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:20]}... is beyond 2**53")
    return number


def boolean(text: str) -> bool:
    """Type of flags that take `True` or `False`, as in the original's evaluation, or no value."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


BOOLEAN: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "default": False}  # for add_argument


def check_at_least(flags: argparse.Namespace, least: int, *names: str) -> None:
    """Refuse numbers, alone or in a list, below `least`; None (flag not given) passes."""
    for name in names:
        value = getattr(flags, name)
        value = min(value) if isinstance(value, list) else value
        if value is not None and value < least:
            raise UserError(f"--{name}: {value}; use at least {least}")
