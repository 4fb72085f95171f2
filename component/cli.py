"""How do all programs handle flags, user errors and Ctrl-C?"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from component.error import UserError


def exit_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate `main`: after a UserError it prints the message and exits with status 1, after Ctrl-C with 130."""

    @functools.wraps(main)
    def wrapper() -> None:
        try:
            main()
        except UserError as error:
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # one message, not one per GPU
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)  # the shell's convention: 128 + SIGINT

    return wrapper


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
