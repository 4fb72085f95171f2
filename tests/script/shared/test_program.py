"""Programs run by scripts: status, log, time limit, environment."""

import sys
import time

import pytest

from component.error import UserError
from script.shared.program import execute, in_a_process, run, show_and_run


@pytest.mark.parametrize("status", [0, 3])
def test_status_and_log(status, tmp_path):
    program = f"import sys; print('out'); print('err', file=sys.stderr); sys.exit({status})"
    assert run([sys.executable, "-c", program], tmp_path / "log", 60, tmp_path) == status
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]


@pytest.mark.parametrize("own_session", [False, True])  # torchrun starts its workers in their own
def test_a_time_limit_kills_children_too(tmp_path, own_session):
    child = "import time, pathlib; time.sleep(1); pathlib.Path('alive').touch()"
    program = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session={own_session})"
    )
    assert run([sys.executable, "-c", program], tmp_path / "log", 0.5, tmp_path) is None
    time.sleep(1.5)
    assert not (tmp_path / "alive").exists()


def test_a_function_in_a_new_process():
    assert in_a_process(divmod, 17, 5) == (3, 2)


def test_execute(tmp_path):
    execute(["-c", "import os; print(os.environ['HF_HUB_OFFLINE'], os.path.exists('train.py'))"], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "1 True\n"


def test_execute_reports_failures(tmp_path):
    with pytest.raises(UserError, match=r"ended with status 2: error: no such thing; see .*log"):
        execute(["-c", "import sys; print('working'); print('error: no such thing'); sys.exit(2)"], tmp_path / "log")


def test_environment_and_folder(tmp_path):
    code = "import os, sys; print(os.environ['WORD'], os.getcwd()); sys.exit(3)"
    assert run([sys.executable, "-c", code], tmp_path / "log", cwd=tmp_path, environment={"WORD": "said"}) == 3
    assert (tmp_path / "log").read_text() == f"said {tmp_path}\n"


def test_show_and_run(capfd):
    assert show_and_run("python -c 'print(1 + 1)'") > 0
    assert capfd.readouterr().out == "$ python -c 'print(1 + 1)'\n2\n"
    with pytest.raises(SystemExit, match="error: the command above ended with status 5"):
        show_and_run("python -c 'raise SystemExit(5)'")
