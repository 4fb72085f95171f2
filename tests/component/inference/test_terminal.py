"""How are prompts read from a pipe? Editing, history and Ctrl-C are tested in tests/script/inference/test_chat.py."""

import io
import sys
from pathlib import Path

import pytest

from component.error import UserError
from component.inference.terminal import history_file, line_editing, prompts, read_input


@pytest.fixture
def typed(monkeypatch):
    def set_input(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return set_input


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"One?\n\n   \nTwo?", ["One?", "Two?"]),
        (b" One? \n/exit\nTwo?\n", [" One? "]),
        (b"One?\n  /exit  \nTwo?\n", ["One?"]),
        ("Größe?\n".encode(), ["Größe?"]),
    ],
)
def test_lines_until_the_end_or_exit(content, lines, typed):
    typed(content)
    assert list(prompts("")) == lines


def test_a_line_that_cannot_be_decoded(typed):
    typed(b"One?\n\xff\xfe\n")
    with pytest.raises(UserError, match="standard input: not UTF-8"):
        list(prompts(""))


def test_one_prompt(typed):
    typed(b"One?\n\nTwo?")
    assert read_input() == "One?\n\nTwo?"
    typed(b"\xff")
    with pytest.raises(UserError, match="standard input"):
        read_input()


def test_at_a_terminal_nothing_is_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    assert read_input() is None


def test_a_pipe_leaves_no_history(typed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "longqlora" / "history"
    typed(b"")
    with line_editing():
        pass
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("XDG_STATE_HOME")
    assert history_file() == Path.home() / ".local" / "state" / "longqlora" / "history"
