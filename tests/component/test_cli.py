"""How do all programs handle flags, user errors, the disk, closed pipes and Ctrl-C?"""

import argparse
import errno
import logging
import os
import signal
import subprocess
import sys
import warnings

import pytest

from component.cli import QUIET, boolean, exit_on_user_error, new_parser, show
from component.error import UserError
from component.storage.atomic import atomic_file
from tests.conftest import ROOT


def test_boolean_false_is_false():
    """With the original's `type=bool`, any non-empty text is true."""
    assert boolean("False") is False


def ending(error: BaseException) -> int | str | None:
    """The exit status of a program that raises `error`."""

    @exit_on_user_error
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


FULL, READ_ONLY = OSError(errno.ENOSPC, "No space left on device", "/disk/f"), OSError(errno.EROFS, "ro", "/cd/f")
MISSING = FileNotFoundError(errno.ENOENT, "No such file or directory", "/gone/f")
RUST = Exception("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UserError("--seed: -1; use 0 or more"), 1, "error: --seed: -1; use 0 or more\n"),
        (FULL, 1, "error: /disk/f: No space left on device; free some space, or write to another disk\n"),
        (READ_ONLY, 1, "error: /cd/f: Read-only file system; name another place\n"),
        (MISSING, 1, "error: /gone/f: No such file or directory; check the path\n"),
        (RUST, 1, "No space left on device; free some space, or write to another disk\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["user", "K14-full", "K14-read-only", "K14-missing", "K14-rust", "K14-ctrl-c"],
)
def test_k14_one_message_and_a_status(error, status, told, capsys):
    assert ending(error) == status
    printed = capsys.readouterr().err
    assert printed.endswith(told)
    assert bool(printed) == bool(told)


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), OSError("no number: a library's words"), BrokenPipeError(32, "")]
)
def test_bugs_keep_their_traceback(error):
    """A broken pipe too, where it is not that of stdout."""

    @exit_on_user_error
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        main()


def test_k14_a_full_disk_is_told_with_its_file(tmp_path, capsys):
    """The operating system names no file when a write fails."""

    @exit_on_user_error
    def main() -> None:
        with atomic_file(tmp_path / "result.json"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit):
        main()
    assert f"error: {tmp_path}/result.json: No space left on device" in capsys.readouterr().err


PROGRAM = """
import sys
import warnings
from component.cli import exit_on_user_error
@exit_on_user_error
def main():
    for _ in range(int(sys.argv[1])):
        print("caf\\u00e9 \\udcff")
main()
"""


def test_k14_an_ascii_terminal_shows_escapes():
    """Also of a name that is not UTF-8."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", PROGRAM, "1"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, check=True)
    assert done.stdout == rb"caf\xe9 \udcff" + b"\n"


@pytest.mark.parametrize("lines", [1, 100_000], ids=["flushed-at-exit", "in-the-middle"])
def test_k14_a_closed_pipe_ends_quietly(lines):
    command = [sys.executable, "-c", PROGRAM, str(lines)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("~/m", "/h/m"),
        ("--base_model=~/m", "--base_model=/h/m"),
        ("x=~/m:~/a@128", "x=/h/m:/h/a@128"),
        ("~", "/h"),
        ("a~/b", "a~/b"),
        ("~other/b", "~other/b"),
        ("what is ~/b = ~/c?", "what is ~/b = ~/c?"),
    ],
)
def test_k21_home_in_every_flag(word, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setattr(sys, "argv", ["p.py", word])
    seen: list[str] = []
    exit_on_user_error(lambda: seen.extend(sys.argv[1:]))()
    assert seen == [expected]


def test_k14_a_word_that_is_not_utf_8(capsys, monkeypatch):
    """A file name in Latin-1: no title, record or message could hold it."""
    monkeypatch.setattr(sys, "argv", ["p.py", "--save_path", "caf\udce9"])
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(lambda: None)()
    assert end.value.code == 1
    assert (
        capsys.readouterr().err == "error: 'caf\\udce9' is not UTF-8; rename the file, or set LANG to its encoding\n"
    )


def test_quiet_leaves_results_and_errors(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--quiet"])

    @exit_on_user_error
    def main() -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--quiet", **QUIET)
        assert parser.parse_args().quiet is True
        print("a notice", file=sys.stderr)
        logging.getLogger("transformers").warning("a warning")
        warnings.warn("a warning", stacklevel=1)
        print("a result")
        show("a reply")
        raise UserError("wrong")

    stream = sys.stderr
    with pytest.raises(SystemExit):
        main()
    assert tuple(capsys.readouterr()) == ("a result\n", "a reply\nerror: wrong\n")
    assert sys.stderr is stream
    assert logging.root.manager.disable == logging.NOTSET


def test_k21_an_integer_beyond_any_size(capsys):
    parser = new_parser("")
    parser.add_argument("--windows", type=int, nargs="+")
    assert parser.parse_args(["--windows", "9007199254740992", "-1"]).windows == [2**53, -1]
    for word in ("9007199254740993", "-" + "9" * 400):
        with pytest.raises(SystemExit) as end:
            parser.parse_args([f"--windows={word}"])
        assert end.value.code == 2
        assert "argument --windows: " in capsys.readouterr().err
