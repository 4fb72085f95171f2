"""What does the web page look like, and how is it served?"""

import pytest

from component.error import UserError
from component.inference.engine import Engine
from component.inference.flags import generation_parser
from component.inference.web import build_page, import_gradio
from tests.conftest import build_llama


@pytest.fixture
def blocks(tiny_llama_config, tokenizer):
    return build_page(Engine(build_llama(tiny_llama_config), tokenizer, generation_parser("").parse_args([])))


def test_the_page_is_built(blocks):
    ids = {block.elem_id for block in blocks.blocks.values() if getattr(block, "elem_id", None)}
    assert ids == {"document", "meter", "chat", "note", "question", "send", "stop", "clear", "system"}


def test_k19_no_handler_takes_the_chat_from_the_browser(blocks):
    inputs = {type(part).__name__ for handler in blocks.fns.values() for part in handler.inputs}
    assert inputs == {"Textbox", "State", "Slider", "Checkbox", "Radio", "File"}


def test_k19_who_leaves_stops(blocks):
    assert [handler.name for handler in blocks.fns.values() if (None, "unload") in handler.targets] == ["halt"]


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(UserError, match=r"web.py needs the package gradio; pip install -r requirements.txt"):
        import_gradio()
