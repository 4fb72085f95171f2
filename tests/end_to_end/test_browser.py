"""The web page in a real browser: documents, streamed and stopped answers, a password, system prompts, two visitors.

Needs Chromium and its driver on the PATH (Debian: chromium, chromium-driver), and selenium==4.44.0.
"""

import contextlib
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.pdf import pdf
from tests.web_server import BASE, served, wait

pytestmark = pytest.mark.slow
DOCUMENT = "def first():\n    return 1\n\n\ndef second():\n    return 2\n\n\n" * 20
# nothing of Chromium's own goes to the network
QUIET = ("quic", "background-networking", "component-update", "sync", "gpu", "dev-shm-usage")


@pytest.fixture
def browser(tmp_path):
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium==4.44.0")
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in programs.values():
        pytest.skip(f"needs Chromium and its driver on the PATH: {programs}")
    options = selenium.ChromeOptions()
    options.binary_location = programs["chromium"]
    words = ["--headless=new", "--no-sandbox", "--no-first-run", "--window-size=1280,900"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", *(f"--disable-{name}" for name in QUIET)]
    for word in words:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = selenium.Chrome(service=selenium.ChromeService(programs["chromedriver"]), options=options)
    yield driver
    driver.quit()


@pytest.fixture
def server(tmp_path):
    """Starts web.py with more flags; at the end it has written no traceback."""
    with contextlib.ExitStack() as stack:
        yield lambda *more: stack.enter_context(served(tmp_path, *more))
    assert "Traceback" not in (tmp_path / "log").read_text()


class Tab:
    """One visitor: a tab of the browser, switched to before each use."""

    def __init__(self, browser, address: str, folder: Path) -> None:
        browser.switch_to.new_window("tab")
        self.browser, self.folder, self.handle = browser, folder, browser.current_window_handle
        browser.get(address)

    def all(self, selector: str) -> list:
        self.browser.switch_to.window(self.handle)
        return self.browser.find_elements("css selector", selector)

    def part(self, selector: str):
        return next(iter(self.all(selector)), None)

    def text(self, selector: str) -> str:
        """Also of a tab in the background, which is not laid out."""
        element = self.part(selector)
        return self.browser.execute_script("return arguments[0].innerText", element) if element else ""

    def value(self, selector: str) -> str:
        return self.part(selector).get_attribute("value")

    def ready(self) -> "Tab":
        wait(lambda: self.part("#question textarea"))
        return self

    def choose(self, name: str, content: str | bytes) -> None:
        file = self.folder / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        for button in self.all("#document button[aria-label=Clear]"):
            button.click()
            wait(lambda: "No document" in self.text("#meter"))
        wait(lambda: self.part("#document input[type=file]"))
        self.part("#document input[type=file]").send_keys(str(file))

    def upload(self, name: str, content: str) -> None:
        self.choose(name, content)
        wait(lambda: name in self.text("#meter"))

    def fill(self, selector: str, text: str) -> None:
        part = self.part(selector)
        part.clear()
        part.send_keys(text)

    def ask(self, question: str) -> None:
        self.fill("#question textarea", f"{question}\n")  # Enter sends

    def is_answering(self) -> bool:
        return self.part("#stop").is_enabled()

    def answer(self) -> str:
        """The last answer, once it is complete."""
        wait(lambda: "tokens of context used" in self.text("#note") and not self.is_answering())
        return self.text("#chat [data-testid=bot]:last-of-type")

    def stop(self) -> float:
        """Press the button; returns seconds until the page says that the answer is over."""
        start = time.monotonic()
        self.part("#stop").click()
        wait(lambda: "stopped" in self.text("#note") and not self.is_answering(), 20)
        return time.monotonic() - start


def test_a_document_and_a_chat(browser, server, tmp_path):
    """A document is uploaded, an answer streams, the next is stopped; a long document is refused, then truncated."""
    page = Tab(browser, server(), tmp_path).ready()
    assert "The context is 2,048 tokens" in page.text("#meter")
    page.upload("code.txt", DOCUMENT)
    assert "of 2,048 tokens of context" in page.text("#meter")

    page.fill("#question textarea", "def third():")
    page.part("#send").click()
    lengths = set()
    while "cache" not in page.text("#note"):
        lengths.add(len(page.text("#chat")))
    assert len(lengths) > 5, "the answer is streamed"
    assert "code.txt and the chat" in page.text("#meter")

    before = page.text("#chat")
    page.ask("def fourth():")
    wait(lambda: page.is_answering() and len(page.text("#chat")) > len(before) + 40)
    page.stop()
    assert page.part("#send").is_enabled()

    page.upload("long.txt", DOCUMENT * 8)
    assert "It does not fit" in page.text("#meter")
    page.ask("def fifth():")
    wait(lambda: "--truncate" in page.text("#note"))
    wait(lambda: page.value("#question textarea") == "def fifth():")
    browser.find_element("xpath", "//label[contains(., 'middle')]").click()
    page.part("#send").click()
    wait(lambda: "tokens were cut (middle)" in page.text("#note") and "cache" in page.text("#note"))

    requests = [
        entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]
    ]
    assert requests
    assert not [message for message in requests if '"url":"https://' in message], "nothing is loaded from other hosts"
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_password(browser, server, tmp_path):
    page = Tab(browser, server("--auth", "me:secret"), tmp_path)

    def log_in(password: str) -> None:
        page.fill("input[type=text]", "me")
        page.fill("input[type=password]", password)
        page.part("button.primary").click()

    wait(lambda: page.part("input[type=password]"))
    log_in("wrong")
    wait(lambda: "Incorrect Credentials" in page.text("body"))
    page.browser.refresh()
    wait(lambda: page.part("input[type=password]"))
    assert page.part("#question") is None
    log_in("secret")
    page.ready().ask("Who?")
    assert page.answer()


def words(text: str) -> list[str]:
    """The page shows an answer as Markdown, so blanks and punctuation may change."""
    return re.findall(r"[a-zA-Z0-9]+", text)


def continued(system: str, question: str) -> list[str]:
    """Words of 12 greedy tokens after Vicuna's format, by stock transformers with positions scaled by 4."""
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, rope_parameters=scaled)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = f"{system}\nUSER: {question}\nASSISTANT: "
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt.input_ids.shape[1] :]
    return words(tokenizer.decode(ids, skip_special_tokens=True))


def test_system_prompts(browser, server, tmp_path):
    """The field begins with --system, and what a visitor writes there is what the model reads, for him alone."""
    systems, question = ("import os\nimport sys", "class Parser: def parse"), "def main():"
    expected = [continued(system, question) for system in systems]
    assert expected[0] != expected[1]
    assert all(expected)
    address = server("--system", systems[0], "--do_sample", "false", "--max_new_tokens", "12")
    page = Tab(browser, address, tmp_path).ready()
    assert page.value("#system textarea") == systems[0]
    page.ask(question)
    assert words(page.answer()) == expected[0]
    page.part("#clear").click()
    wait(lambda: "No document" in page.text("#meter"))
    page.fill("#system textarea", systems[1])
    page.ask(question)
    wait(lambda: page.text("#chat [data-testid=bot]"))
    assert words(page.answer()) == expected[1]
    other = Tab(browser, address, tmp_path).ready()
    assert other.value("#system textarea") == systems[0]
    other.ask(question)
    assert words(other.answer()) == expected[0]


def test_two_visitors(browser, server, tmp_path):
    """One waits while the other is answered; both press Stop, the one who waits first."""
    address = server("--max_new_tokens", "1800")
    first, second = (Tab(browser, address, tmp_path).ready() for _ in range(2))
    first.ask("def first():")
    wait(lambda: len(first.text("#chat")) > 60)
    second.ask("def second():")
    wait(lambda: "waiting for the answers of others" in second.text("#note"))
    assert second.stop() < 5
    assert "def second" not in second.text("#chat"), "what has no answer is no part of the conversation"
    before = len(first.text("#chat"))
    wait(lambda: len(first.text("#chat")) > before)  # the other's stop is not his
    assert first.stop() < 5
    stopped = first.text("#chat")
    second.ask("def third():")
    wait(lambda: len(second.text("#chat")) > 60, 10)  # the model is free
    second.stop()
    assert first.text("#chat") == stopped


def test_a_document_is_read_while_another_visitor_is_answered(browser, server, tmp_path):
    slow = f"The dog.) Tj {'0 0 m ' * 200_000} ("  # a path that is never drawn: seconds for the parser, no text
    address = server("--max_new_tokens", "5")
    reader, other = (Tab(browser, address, tmp_path).ready() for _ in range(2))
    reader.choose("slow.pdf", pdf(slow, slow))
    other.ask("Who?")
    assert other.answer()
    assert "slow.pdf" not in reader.text("#meter"), "the answer came first"
    wait(lambda: "slow.pdf" in reader.text("#meter"))
    assert re.search(r"slow.pdf: \d+ of 2,048 tokens", reader.text("#meter")), reader.text("#meter")
