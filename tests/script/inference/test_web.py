"""web.py: errors at start, requests without a browser, and the page in a real one."""

import json
import os
import shutil
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
import pytest

from tests.conftest import ROOT
from tests.outcome import refused
from tests.pdf import pdf

WEB = "script/inference/web.py"
BASE = ROOT / "script/demo/base"
DOCUMENT = "def first():\n    return 1\n\n\ndef second():\n    return 2\n\n\n" * 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class TestWrong:
    @pytest.mark.parametrize("port", ["0", "65536"])
    def test_an_invalid_port(self, port, run_program, base_folder):
        outcome = run_program(WEB, "--model_name_or_path", base_folder, "--port", port)
        refused(outcome, "--port", port, "from 1 to 65535")

    def test_a_port_in_use(self, run_program, base_folder):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            outcome = run_program(WEB, "--model_name_or_path", base_folder, "--port", port)
        refused(outcome, "--port", f"127.0.0.1:{port}", "name another port")

    def test_without_gradio(self, run_program, base_folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        outcome = run_program(WEB, "--model_name_or_path", base_folder)
        refused(outcome, "web.py needs the package gradio", "pip install -r requirements.txt")

    @pytest.mark.parametrize("value", ["secret", "secret:", ":secret", " :secret"])
    def test_k19_an_incomplete_password(self, value, run_program, base_folder):
        outcome = run_program(WEB, "--model_name_or_path", base_folder, f"--auth={value}")
        refused(outcome, "--auth: user or password is missing; use USER:PASSWORD")
        assert "secret" not in outcome.err

    def test_local_by_default(self, run_program):
        outcome = run_program(WEB, "--help")
        assert "(default 127.0.0.1)" in outcome.out


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


@pytest.fixture
def address(tmp_path):
    with served(tmp_path) as address:
        yield address
    assert "Traceback" not in (tmp_path / "log").read_text()


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


def test_k19_requests(tmp_path):
    """Another site, somebody without the password, odd values, and a visitor who leaves, in front of one server."""
    with served(tmp_path, "--auth", "me:secret") as address, httpx.Client(base_url=address, timeout=60) as client:
        evil = client.get("/", headers={"host": "evil.com"})
        assert (evil.status_code, evil.text.split(";")[0]) == (403, "Host: 'evil.com' is no name of this server")
        files = {"files": ("a.txt", b"x")}
        assert client.post("/gradio_api/upload", files=files).status_code == 401
        assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "me", "password": "secret"}).status_code == 200
        foreign = client.post("/gradio_api/upload", files=files, headers={"origin": "http://evil.com"})
        assert (foreign.status_code, foreign.text.split(" is")[0]) == (403, "Origin: 'http://evil.com'")

        visitor = Visitor(client)
        opened = visitor.call("opened", visitor.upload("a.pdf", pdf("The dog.")))
        assert "a.pdf: <b>" in opened["output"]["data"][1]
        assert visitor.ask("Who?")["output"]["data"][3].startswith("⚠ ") is False
        assert "; use a number" in visitor.ask("Who?", "abc")["output"]["data"][3]
        outside = visitor.call("opened", {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}})
        assert "was not uploaded by a user" in outside["output"]["error"]

        # the other's answer comes long before the 2000 tokens of the one who left could have been generated
        gone, other = Visitor(client), Visitor(client)
        gone.send("ask", "Who?", None, 2000, False, 0.35, 0.9, 1.0, "", "refuse")
        assert any(message["msg"] == "process_generating" for message in gone.messages(12))
        start = time.monotonic()
        assert "tokens of context used" in other.ask("Who?")["output"]["data"][3]
        assert time.monotonic() - start < 5


@pytest.fixture
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium==4.44.0")
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in programs.values():
        pytest.skip(f"needs Chromium and its driver on the PATH: {programs}")
    options = selenium.ChromeOptions()
    options.binary_location = programs["chromium"]
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = selenium.Chrome(service=selenium.ChromeService(programs["chromedriver"]), options=options)
    yield driver
    driver.quit()


def wait(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.1)


@pytest.mark.slow
def test_in_a_browser(browser, address, tmp_path):
    """A document is uploaded, an answer streams, the next is stopped; a long document is refused, then truncated."""

    def part(selector: str):
        found = browser.find_elements("css selector", selector)
        return found[0] if found else None

    def text(selector: str) -> str:
        element = part(selector)
        return element.text if element else ""

    def upload(name: str, content: str) -> None:
        (tmp_path / name).write_text(content)
        for button in browser.find_elements("css selector", "#document button[aria-label=Clear]"):
            button.click()
            wait(lambda: "No document" in text("#meter"))
        wait(lambda: part("#document input[type=file]"))
        part("#document input[type=file]").send_keys(str(tmp_path / name))
        wait(lambda: name in text("#meter"))

    browser.get(address)
    wait(lambda: part("#question textarea"))
    assert "The context is 2,048 tokens" in text("#meter")
    upload("code.txt", DOCUMENT)
    assert "of 2,048 tokens of context" in text("#meter")

    part("#question textarea").send_keys("def third():")
    part("#send").click()
    lengths = set()
    while "cache" not in text("#note"):
        lengths.add(len(text("#chat")))
    assert len(lengths) > 5, "the answer is streamed"
    assert "code.txt and the chat" in text("#meter")

    before = text("#chat")
    part("#question textarea").send_keys("def fourth():\n")  # Enter sends
    wait(lambda: part("#stop").is_enabled() and len(text("#chat")) > len(before) + 40)
    part("#stop").click()
    wait(lambda: "stopped" in text("#note"), 10)
    assert part("#send").is_enabled()
    if folder := os.environ.get("LONGQLORA_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / "web.png"))

    upload("long.txt", DOCUMENT * 8)
    assert "It does not fit" in text("#meter")
    part("#question textarea").send_keys("def fifth():\n")
    wait(lambda: "--truncate" in text("#note"))
    wait(lambda: part("#question textarea").get_attribute("value") == "def fifth():")
    browser.find_element("xpath", "//label[contains(., 'middle')]").click()
    part("#send").click()
    wait(lambda: "tokens were cut (middle)" in text("#note") and "cache" in text("#note"))

    requests = [
        entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]
    ]
    assert requests
    assert not [message for message in requests if '"url":"https://' in message], "nothing is loaded from other hosts"
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
