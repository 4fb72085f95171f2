"""Assertions about how a program ended."""

from tests.conftest import Outcome


def refused(outcome: Outcome, *parts: str) -> None:
    """Nonzero status, no traceback, and an error message with each of `parts`."""
    assert outcome.status not in (0, None)
    assert "Traceback" not in outcome.err
    assert "error: " in outcome.err
    message = outcome.err[outcome.err.rindex("error: ") :]
    for part in parts:
        assert part in message


def refused_by_us(outcome: Outcome, *parts: str) -> None:
    """The same with status 1: rejected by the program's own checks, not by argparse."""
    assert outcome.status == 1, outcome.err
    refused(outcome, *parts)
