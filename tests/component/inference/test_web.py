"""What does the web page look like, and how is it served?"""

import pytest

from component.error import UserError
from component.inference.engine import Engine
from component.inference.flags import chat_parser
from component.inference.web import build_page, import_gradio
from component.rope import extend_context
from tests.conftest import build_llama
from tests.generation_flags import flags


@pytest.fixture
def blocks(tiny_llama_config, tokenizer):
    return build_page(Engine(build_llama(tiny_llama_config), tokenizer, flags()))


def test_the_page_is_built(blocks):
    ids = {block.elem_id for block in blocks.blocks.values() if getattr(block, "elem_id", None)}
    assert ids == {"document", "meter", "chat", "note", "question", "send", "stop", "clear", "system"}


def test_k19_no_handler_takes_the_chat_from_the_browser(blocks):
    inputs = {type(part).__name__ for handler in blocks.fns.values() for part in handler.inputs}
    assert inputs == {"Textbox", "State", "Slider", "Checkbox", "Radio", "File"}


def test_k19_who_leaves_stops(blocks):
    assert [handler.name for handler in blocks.fns.values() if (None, "unload") in handler.targets] == ["halt"]


def test_k21_sliders_reach_the_values_of_the_flags(tiny_llama_config, tokenizer):
    """With --max_new_tokens above the slider's end, the page showed another number than the program used."""
    extend_context(tiny_llama_config, 8192)
    words = ["--max_new_tokens", "6000", "--temperature", "3", "--top_p", "0.02", "--repetition_penalty", "0.9"]
    flags = chat_parser("").parse_args([*words, "--system", "Be brief."])
    blocks = build_page(Engine(build_llama(tiny_llama_config), tokenizer, flags)).blocks.values()
    sliders = {block.label: block for block in blocks if type(block).__name__ == "Slider"}
    assert {label: block.value for label, block in sliders.items()} == {
        "Maximum new tokens": 6000,
        "Temperature": 3,
        "Top-p": 0.02,
        "Repetition penalty": 0.9,
    }
    assert all(block.minimum <= block.value <= block.maximum for block in sliders.values())
    assert [block.value for block in blocks if getattr(block, "elem_id", "") == "system"] == ["Be brief."]


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(UserError, match=r"web.py needs the package gradio; pip install -r requirements.txt"):
        import_gradio()
