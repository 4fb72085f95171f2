"""Does a stranger's chat template end?"""

import threading
import time

import pytest
from transformers import AutoTokenizer

from component.data import template
from component.data.template import fill_template
from component.error import UserError

MESSAGES = [{"role": "user", "content": "Why?"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


def test_text(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ '>' if add_generation_prompt }}"
    assert fill_template(tokenizer, MESSAGES) == "[Why?]"
    assert fill_template(tokenizer, MESSAGES, opens_answer=True) == "[Why?]>"


def test_what_the_template_raises(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('not like this') }}"
    with pytest.raises(UserError, match=r"template: .* rejects a conversation \(not like this\)"):
        fill_template(tokenizer, MESSAGES)


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_endless_loops(tokenizer, monkeypatch, in_main_thread):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    monkeypatch.setattr(template, "_endless", set())
    tokenizer.chat_template, found = ENDLESS, []

    def fill() -> None:
        with pytest.raises(UserError) as raised:
            fill_template(tokenizer, MESSAGES)
        found.append(str(raised.value))

    if in_main_thread:
        fill()
    else:
        thread = threading.Thread(target=fill)
        thread.start()
        thread.join(60)
    assert found == [
        f"template: the chat template of {tokenizer.name_or_path} was not filled in after 0.2 seconds; correct it, or "
        "use a model that has another"
    ]
    monkeypatch.setattr(template, "SECONDS", 1e9)  # the next conversation does not wait
    with pytest.raises(UserError, match="was not filled in"):
        fill_template(tokenizer, MESSAGES)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert fill_template(tokenizer, MESSAGES) == "Why?"


def test_a_thread_that_finished_is_left_alone(tokenizer, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.05)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert fill_template(tokenizer, MESSAGES) == "Why?"
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # Python code, which an exception for this thread would reach
        pass
