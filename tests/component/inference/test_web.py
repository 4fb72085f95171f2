"""What does the web page look like, and what do its handlers return?"""

import pytest

from component.error import UserError
from component.inference.engine import Engine
from component.inference.flags import generation_parser
from component.inference.web import Page, build_page, import_gradio, meter
from component.rope import extend_context
from tests.conftest import build_llama
from tests.pdf import pdf

SETTINGS = {"do_sample": False, "max_new_tokens": 6, "truncate": None}


@pytest.fixture
def page(tiny_llama_config, tokenizer) -> Page:
    extend_context(tiny_llama_config, 512)
    return Page(Engine(build_llama(tiny_llama_config).eval(), tokenizer, generation_parser("").parse_args([])))


class TestMeter:
    def test_a_part(self):
        text = meter(256, 1024, "a.txt")
        assert "a.txt: <b>256</b> of 1,024 tokens of context (25%)." in text
        assert 'class="meter"' in text
        assert "width: 25.0%" in text

    def test_too_much(self):
        text = meter(2048, 1024, "a.txt")
        assert "(200%). It does not fit" in text
        assert 'class="meter full"' in text
        assert "width: 100.0%" in text

    def test_names_are_escaped(self):
        assert "<script>" not in meter(1, 2, "<script>")


class TestDocument:
    @pytest.mark.parametrize(("name", "content"), [("a.txt", b"The dog."), ("a.pdf", pdf("The dog."))])
    def test_is_read_and_measured(self, name, content, page, tokenizer, tmp_path):
        (tmp_path / name).write_bytes(content)
        state, shown, chat = page.open_document(str(tmp_path / name))
        assert state == {"document": "The dog.", "name": name}
        assert f"{name}: <b>{len(tokenizer.tokenize('The dog.'))}</b> of 512" in shown
        assert chat == []

    def test_what_cannot_be_read(self, page, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"caf\xe9")
        state, shown, _ = page.open_document(str(tmp_path / "a.txt"))
        assert state is None
        assert "a.txt is not UTF-8" in shown
        assert str(tmp_path) not in shown, "paths of the server are not disclosed"

    def test_none(self, page):
        assert page.open_document(None) == (None, page.blank(), [])
        assert "The context is 512 tokens" in page.blank()


class TestAsking:
    def last(self, page, question, chat, state, **settings):
        *_, row = page.ask(question, chat, state, {**SETTINGS, **settings}, "visitor")
        return row

    def test_about_a_document(self, page):
        chat, state, bar, note = self.last(page, "Who?", [], {"document": "The dog.", "name": "a.txt"})
        assert [message["role"] for message in chat] == ["user", "assistant"]
        assert chat[0]["content"] == "Who?"
        assert state["conversation"].turns == [("The dog.\n\nWho?", chat[1]["content"])]
        assert "a.txt and the chat: <b>" in bar
        assert note.endswith("dynamic cache 0.0 MiB")
        chat, state, _, _ = self.last(page, "Where?", chat, state)
        assert [message["content"] for message in chat[::2]] == ["Who?", "Where?"]
        assert state["conversation"].turns[1][0] == "Where?", "the document is in the first turn only"

    def test_too_long_a_question_changes_nothing(self, page):
        chat = [{"role": "user", "content": "before"}]
        shown, state, _, note = self.last(page, "dog " * 900, chat, None)
        assert shown == chat
        assert state["conversation"].turns == []
        assert note.startswith("⚠ the prompt has")

    def test_stop(self, page):
        for row in page.ask("Who?", [], None, {**SETTINGS, "max_new_tokens": 300}, "visitor"):
            if row[0][-1]["content"]:
                page.stop("another")
                page.stop("visitor")
        assert row[3].endswith("stopped")

    def test_a_new_chat_keeps_the_document(self, page):
        _, state, _, _ = self.last(page, "Who?", [], {"document": "The dog.", "name": "a.txt"})
        kept, shown, chat = page.forget(state)
        assert (kept, chat) == ({"document": "The dog.", "name": "a.txt"}, [])
        assert "a.txt: <b>" in shown
        assert page.forget(None) == (None, page.blank(), [])

    def test_stop_events_do_not_accumulate(self, page):
        for visitor in range(50):
            list(page.ask("Who?", [], None, {**SETTINGS, "max_new_tokens": 1}, str(visitor)))
        assert page.stops == {}


def test_the_page_is_built(page):
    blocks = build_page(page.engine)
    ids = {block.elem_id for block in blocks.blocks.values() if getattr(block, "elem_id", None)}
    assert ids == {"document", "meter", "chat", "note", "question", "send", "stop", "clear"}


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(UserError, match=r"web.py needs the package gradio; pip install -r requirements.txt"):
        import_gradio()
