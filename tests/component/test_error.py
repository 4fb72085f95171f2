"""What a user reads is short and can do nothing to the terminal."""

from component.error import LONGEST_MESSAGE, UserError, printable


def test_control_characters_are_shown_not_sent():
    assert str(UserError("a\x1b[2Jb\x07\r\nc\u202e")) == "a\\x1b[2Jb\\x07\\r\nc\\u202e"
    assert str(UserError("Größe 東京: 'x'")) == "Größe 東京: 'x'"


def test_long_messages_keep_both_ends():
    text = str(UserError("start" + "x" * 10**6 + "end"))
    assert len(text) < LONGEST_MESSAGE + 60
    assert text.startswith("startx")
    assert text.endswith("xend")
    assert "996,008 characters" in text
    assert printable("abc", 3) == "abc"
