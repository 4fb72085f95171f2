import argparse
import functools
import os
import sys
from collections.abc import Callable

from component.error import UserError


def exit_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Let a program end with status 1 and the message alone when its user made a mistake."""

    @functools.wraps(main)
    def wrapper() -> None:
        try:
            main()
        except UserError as error:
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # one message, not one per GPU
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)

    return wrapper


def boolean(text: str) -> bool:
    """For flags that take `True` and `False`, as the original's evaluation does, and also stand alone."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"
