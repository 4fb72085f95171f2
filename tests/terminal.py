"""A program at a terminal: in a child of the test process, so that nothing is imported twice; driven by its keys."""

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
    """Use as a context: what is still running at the end is killed."""

    def __init__(self, program: str, *words: object, state: Path, seconds_per_token: float = 0.0) -> None:
        self.shown = ""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            status = 70
            # as a shell at a terminal starts it, also where the tests run behind an & that ignores Ctrl-C
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
        """What is shown up to `text`; it is taken away."""
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
        except OSError:  # Linux's way to say that the other end is closed
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
    # the test's own are pytest's, which know nothing of the terminal
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv = [str(ROOT / program), *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
    return 0
