import contextlib
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from component.error import UserError

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str], log: Path, limit_s: float, cwd: Path) -> int | None:
    """The command's status, None if it was ended after `limit_s` seconds; what it prints goes to `log`."""
    path = f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}"  # where pip puts deepspeed and ninja
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PATH": path}
    executable = shutil.which(command[0], path=path) or command[0]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [executable, *command[1:]],
            cwd=cwd,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # DeepSpeed's launcher has children, which are ended with it
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def in_a_process(function: Callable, *arguments):
    """`function`'s result. This process itself never touches the GPU: its own part of it would be measured too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def execute(words: list[str], log: Path) -> None:
    """Run one of our programs; what it prints goes to `log`."""
    with log.open("w", encoding="utf-8") as stream:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(
            f"{shlex.join(words[:3])} ended with status {done.returncode}: {' '.join(last)[:300]}; see {log}"
        )
