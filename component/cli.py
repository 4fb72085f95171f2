"""What do all programs do alike with flags, with their user's mistakes, and with Ctrl-C?"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from component.error import UserError


def exit_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Let a program end with status 1 and the message alone when its user made a mistake, with 130 after Ctrl-C."""

    @functools.wraps(main)
    def wrapper() -> None:
        try:
            main()
        except UserError as error:
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # one message, not one per GPU
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)  # as a shell expects of what Ctrl-C has ended

    return wrapper


def boolean(text: str) -> bool:
    """For flags that take `True` and `False`, as the original's evaluation does, and also stand alone."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


BOOLEAN: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "default": False}  # of add_argument


def check_at_least(flags: argparse.Namespace, least: int, *names: str) -> None:
    """Refuse a number, or a list with one, below `least`; None is a flag that was not given."""
    for name in names:
        value = getattr(flags, name)
        value = min(value) if isinstance(value, list) else value
        if value is not None and value < least:
            raise UserError(f"--{name}: {value}; use at least {least}")
