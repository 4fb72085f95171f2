"""Programs that run others: what is shown of them, and what they are told."""

import sys

import pytest

from script.shared.program import run, show_and_run


def test_environment_and_folder(tmp_path):
    code = "import os, sys; print(os.environ['WORD'], os.getcwd()); sys.exit(3)"
    assert run([sys.executable, "-c", code], tmp_path / "log", cwd=tmp_path, environment={"WORD": "said"}) == 3
    assert (tmp_path / "log").read_text() == f"said {tmp_path}\n"


def test_commands_that_are_shown(capfd):
    assert show_and_run("python -c 'print(1 + 1)'") > 0
    assert capfd.readouterr().out == "$ python -c 'print(1 + 1)'\n2\n"
    with pytest.raises(SystemExit, match="error: the command above ended with status 5"):
        show_and_run("python -c 'raise SystemExit(5)'")
