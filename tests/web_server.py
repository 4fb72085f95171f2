"""A running web.py, and its visitors without a browser."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.conftest import ROOT

WEB = "script/inference/web.py"
BASE = ROOT / "script/demo/base"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.1)


@contextmanager
def served(folder: Path, *more: str) -> Iterator[str]:
    """Address of a server with the demo's base at 2048 tokens; SIGINT ends it, and its uploads are gone then."""
    port = free_port()
    words = ["--model_name_or_path", BASE, "--context_size", 2048, "--max_new_tokens", 400, "--port", port, *more]
    (folder / "uploads").mkdir()
    log = (folder / "log").open("w+")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / WEB), *map(str, words)],
        stderr=log,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(folder / "uploads")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # else ignored if a shell's & began the tests
    )
    try:
        wait(lambda: "listening" in (folder / "log").read_text() or server.poll() is not None, 120)
        assert server.poll() is None, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}"
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130
        assert list((folder / "uploads").rglob("*.*")) == []
    finally:
        server.kill()
        log.close()


class Visitor:
    """What a browser's session sends, without a browser."""

    def __init__(self, client: httpx.Client) -> None:
        self.client, self.session = client, uuid.uuid4().hex
        handlers = client.get("/config").json()["dependencies"]
        self.handlers = {handler["api_name"]: handler["id"] for handler in handlers}

    def call(self, name: str, *data) -> dict:
        """The last message about a handler's run."""
        self.send(name, *data)
        return self.messages()[-1]

    def send(self, name: str, *data) -> None:
        body = {"fn_index": self.handlers[name], "data": data, "session_hash": self.session}
        self.client.post("/gradio_api/queue/join", json=body).raise_for_status()

    def messages(self, most: int = 10**6) -> list[dict]:
        """At most `most` messages of the session, up to the end of a handler's run; then the visitor is gone."""
        found: list[dict] = []
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    found.append(json.loads(line[5:]))
                    if found[-1]["msg"] == "process_completed" or len(found) == most:
                        break
        return found

    def upload(self, name: str, content: bytes) -> dict:
        answer = self.client.post("/gradio_api/upload", files={"files": (name, content)}).raise_for_status()
        return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}

    def ask(self, question: str, tokens: object = 5) -> dict:
        return self.call("ask", question, None, tokens, False, 0.35, 0.9, 1.0, "", "refuse")
