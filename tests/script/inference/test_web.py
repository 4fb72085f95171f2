"""web.py: the page in a real browser, and errors at start."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.outcome import refused

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

    def test_local_by_default(self, run_program):
        outcome = run_program(WEB, "--help")
        assert "(default 127.0.0.1)" in outcome.out


@pytest.fixture
def address(tmp_path):
    """Address of a server with the demo's base at 2048 tokens; Ctrl-C ends it."""
    port = free_port()
    words = ["--model_name_or_path", BASE, "--context_size", 2048, "--max_new_tokens", 400, "--port", port]
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / WEB), *map(str, words)],
        stderr=log,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    wait(lambda: "listening" in (tmp_path / "log").read_text() or server.poll() is not None, 120)
    assert server.poll() is None, (tmp_path / "log").read_text()
    yield f"http://127.0.0.1:{port}"
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 130
    assert "Traceback" not in (tmp_path / "log").read_text()
    log.close()


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
