"""How do all programs handle flags?"""

from component.cli import boolean


def test_boolean_false_is_false():
    """With the original's `type=bool`, any non-empty text is true."""
    assert boolean("False") is False
