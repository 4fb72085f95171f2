"""How does a script run another program: with a log file, a time limit, or in a fresh process?"""

import contextlib
import json
import multiprocessing
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil

from component.error import UserError

ROOT = Path(__file__).resolve().parents[2]


def run(
    words: list[str],
    log: Path | None = None,
    limit_s: float | None = None,
    cwd: Path = ROOT,
    *,
    environment: dict[str, str] | None = None,
    stderr: int | None = None,
) -> int | None:
    """Run a command. Returns its exit status, or None if it was killed with its children after `limit_s` seconds.

    Args:
        log: file for stdout and stderr; None inherits this program's.
        environment: variables added to this program's environment.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where pip installs deepspeed and ninja
    with log.open("w", encoding="utf-8") if log else contextlib.nullcontext() as file:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env={**os.environ, **(environment or {}), "PATH": path},
            stdout=file,
            stderr=subprocess.STDOUT if log else stderr,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                kill_with_children(process.pid)
            process.wait()


def kill_with_children(pid: int) -> None:
    """Kill a process and all that it started: launchers' workers are in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def show_and_run(command: str) -> float:
    """Print a command line and run it from the repository root. Returns seconds; exits if the command fails."""
    print(f"$ {command}", flush=True)
    start = time.monotonic()
    if status := run(shlex.split(command)):
        sys.exit(f"error: the command above ended with status {status}")
    return time.monotonic() - start


def execute(words: list[str], log: Path, *, environment: dict[str, str] | None = None) -> None:
    """Run one of this repository's programs offline, with its output in `log`.

    Raises:
        UserError: the program failed; the message ends with its last line of output.
    """
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    status = run([sys.executable, *words], log, environment=fixed | (environment or {}))
    if status:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(f"{shlex.join(words[:3])} ended with status {status}: {' '.join(last)[:300]}; see {log}")


def in_a_process(function: Callable, *arguments):
    """`function`'s result, from a new process: GPU memory that this one allocated would be measured too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def free_port() -> int:
    """For a launcher, whose default port another run may have."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_training(output_dir: Path) -> tuple[dict, list[dict]]:
    """(train_results.json, the log entries with a training loss) of a finished run of train.py."""
    metrics = json.loads((output_dir / "train_results.json").read_text(encoding="utf-8"))
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return metrics, [entry for entry in history if "loss" in entry]
