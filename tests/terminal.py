"""Run a program at a pseudo-terminal, in a fork of the test process (no second import), and type keys."""

import os
import pty
import runpy
import select
import signal
import sys
import time
from pathlib import Path

from tests.conftest import ROOT

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


class Terminal:
    """A context manager that kills the program at exit."""

    def __init__(self, program: str, *words: object, state: Path, seconds_per_token: float = 0.0) -> None:
        self.shown = ""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            status = 70
            # the default handler, also if the tests run in the background and ignore Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                status = _run(program, [str(word) for word in words], state, seconds_per_token)
            finally:
                os._exit(status)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        if self.pid:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        os.close(self.master)

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Consume the output up to and including `text`; returns what precedes it."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"no {text!r} in {self.shown!r}"
            assert self._read(), f"the program ended without {text!r}: {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def status(self) -> int:
        while self._read():
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> bool:
        if not select.select([self.master], [], [], 1)[0]:
            return True
        try:
            piece = os.read(self.master, 4096)
        except OSError:  # on Linux: the other end is closed
            return False
        self.shown += piece.decode(errors="replace")
        return bool(piece)


def _run(program: str, words: list[str], state: Path, seconds_per_token: float) -> int:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def slowly(*args, **kwargs):
        time.sleep(seconds_per_token)
        return forward(*args, **kwargs)

    LlamaForCausalLM.forward = slowly
    os.environ |= {"XDG_STATE_HOME": str(state), "TERM": "dumb"}
    # replace pytest's captured streams by the terminal's
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv = [str(ROOT / program), *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
    return 0
