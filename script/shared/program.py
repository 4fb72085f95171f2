"""How does a script run another program? To its end or for a limited time, shown or into a log, or in a process."""

import contextlib
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

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
    """A command's status; None if it was ended after `limit_s` seconds, with all that it had started.

    Args:
        log: file for what it prints; None lets it print where this program does.
        environment: added to this program's own.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where pip puts deepspeed and ninja
    with log.open("w", encoding="utf-8") if log else contextlib.nullcontext() as file:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env={**os.environ, **(environment or {}), "PATH": path},
            stdout=file,
            stderr=subprocess.STDOUT if log else stderr,
            start_new_session=limit_s is not None,  # DeepSpeed's launcher has children, which are ended with it
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill() if limit_s is None else os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def show_and_run(command: str) -> float:
    """Print a command line and run it from the repository's root; the seconds it took."""
    print(f"$ {command}", flush=True)
    start = time.monotonic()
    if status := run(shlex.split(command)):
        sys.exit(f"error: the command above ended with status {status}")
    return time.monotonic() - start


def execute(words: list[str], log: Path) -> None:
    """Run one of our programs; what it prints goes to `log`.

    Raises:
        UserError: it failed; with its last line.
    """
    status = run([sys.executable, *words], log, environment={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"})
    if status:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(f"{shlex.join(words[:3])} ended with status {status}: {' '.join(last)[:300]}; see {log}")


def in_a_process(function: Callable, *arguments):
    """`function`'s result. This process itself never touches the GPU: its own part of it would be measured too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
