"""Flags and mistakes of every program."""

from component.cli import boolean


def test_boolean_false_is_false():
    """The original's `type=bool` took every non-empty text for true."""
    assert boolean("False") is False
