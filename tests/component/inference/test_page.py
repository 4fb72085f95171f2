"""What does the page do for its visitors?"""

from types import SimpleNamespace

import pytest

from component.inference.engine import Engine
from component.inference.page import Page, meter
from component.rope import extend_context
from tests.conftest import build_llama
from tests.generation_flags import flags
from tests.pdf import pdf

SETTINGS = {"do_sample": False, "max_new_tokens": 6, "truncate": None}


def ids_of(ids: list[int]) -> SimpleNamespace:
    return SimpleNamespace(input_ids=ids)


@pytest.fixture
def page(tiny_llama_config, tokenizer) -> Page:
    extend_context(tiny_llama_config, 512)
    return Page(Engine(build_llama(tiny_llama_config).eval(), tokenizer, flags()))


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
        state, shown, chat = page.open_document(str(tmp_path / name), "visitor")
        assert (state.document, state.name) == ("The dog.", name)
        assert state.conversation.documents == ["The dog."]
        assert f"{name}: <b>{len(tokenizer.tokenize('The dog.'))}</b> of 512" in shown
        assert chat == []

    def test_what_cannot_be_read(self, page, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"caf\xe9")
        state, shown, _ = page.open_document(str(tmp_path / "a.txt"), "visitor")
        assert state is None
        assert "a.txt is not UTF-8" in shown
        assert str(tmp_path) not in shown, "paths of the server are not disclosed"

    def test_none(self, page):
        assert page.open_document(None, "visitor") == (None, page.blank(), [])
        assert "The context is 512 tokens" in page.blank()


class TestBounds:
    def document(self, page, tmp_path, text: str):
        (tmp_path / "a.txt").write_text(text)
        return page.open_document(str(tmp_path / "a.txt"), "visitor")

    def test_k19_tokens(self, page, tmp_path, monkeypatch):
        """The count ends after the part that exceeds 4 x 512 tokens; each part has 100 words of 2 tokens or more."""
        monkeypatch.setattr("component.inference.engine.COUNTED_CHARACTERS", 500)
        calls = []
        monkeypatch.setattr(page.engine, "tokenizer", lambda part, **_: calls.append(part) or ids_of([0] * 1025))
        state, shown, _ = self.document(page, tmp_path, "word " * 3000)
        assert state is None
        assert "a.txt has more than 2,048 tokens, 4 times the model&#x27;s context of 512 tokens; split it" in shown
        assert calls == ["word " * 100] * 2

    def test_k19_characters(self, page, tmp_path):
        state, shown, _ = self.document(page, tmp_path, " " * 16_384 + "x")  # 8 characters x 4 contexts x 512 tokens
        assert state is None
        assert "a.txt has 16,385 characters, too many for 4 times the model" in shown

    def test_k19_one_document_of_a_visitor_at_a_time(self, page, tmp_path, monkeypatch):
        (tmp_path / "a.txt").write_text("The dog.")
        answers = []

        def slow(*_):
            if not answers:
                answers.append(None)
                answers[0] = page.open_document(str(tmp_path / "b.txt"), "visitor")[1]
                answers.append(page.open_document(str(tmp_path / "a.txt"), "another")[0].name)
            return "The dog."

        monkeypatch.setattr("component.inference.page.read_text_file", slow)
        assert page.open_document(str(tmp_path / "a.txt"), "visitor")[0].name == "a.txt"
        assert answers[0].startswith("<div>b.txt: your previous document is still being read; upload it again")
        assert answers[1] == "a.txt"
        assert page.reading == {}

    def test_k19_busy(self, page, tmp_path, monkeypatch):
        monkeypatch.setattr("component.inference.page.BUSY_SECONDS", 0.01)
        for _ in range(3):
            page.readers.acquire()
        assert "a.txt: documents of other visitors are being read" in self.document(page, tmp_path, "The dog.")[1]
        page.readers.release()
        assert self.document(page, tmp_path, "The dog.")[0].document == "The dog."


class TestAsking:
    @pytest.fixture
    def state(self, page, tmp_path):
        (tmp_path / "a.txt").write_text("The dog.")
        return page.open_document(str(tmp_path / "a.txt"), "visitor")[0]

    def last(self, page, question, state, **settings):
        *_, row = page.ask(question, state, {**SETTINGS, **settings}, "visitor")
        return row

    def test_about_a_document(self, page, state):
        chat, state, bar, note = self.last(page, "Who?", state)
        assert [message["role"] for message in chat] == ["user", "assistant"]
        assert chat[0]["content"] == "Who?"
        assert state.conversation.turns == [("The dog.\n\nWho?", chat[1]["content"])]
        assert "a.txt and the chat: <b>" in bar
        assert note.endswith("dynamic cache 0.0 MiB")
        chat, state, _, _ = self.last(page, "Where?", state)
        assert [message["content"] for message in chat[::2]] == ["Who?", "Where?"]
        assert state.conversation.turns[1][0] == "Where?", "the document is in the first turn only"

    def test_k19_a_document_is_tokenized_once(self, page, state, tokenizer, monkeypatch):
        seen = []
        encode = type(tokenizer)._encode_plus
        monkeypatch.setattr(
            type(tokenizer), "_encode_plus", lambda self, text, **kw: seen.append(text) or encode(self, text, **kw)
        )
        for question in ("Who?", "Where?", "When?"):
            _, state, _, _ = self.last(page, question, state)
        assert len([text for text in seen if "The dog." in text]) == 1
        assert len([text for text in seen if "When?" in text]) == 1

    def test_too_long_a_question_changes_nothing(self, page, state):
        before = self.last(page, "Who?", state)[0]
        shown, state, _, note = self.last(page, "dog " * 900, state)
        assert shown == before
        assert len(state.conversation.turns) == 1
        assert note.startswith("⚠ the prompt has")
        note = self.last(page, "x" * 16_384, state)[3]
        assert note.startswith("⚠ the conversation would have more than 16,384 characters")

    def test_stop(self, page):
        for row in page.ask("Who?", None, {**SETTINGS, "max_new_tokens": 300}, "visitor"):
            if row[0][-1]["content"]:
                page.stop("another")
                page.stop("visitor")
        assert row[3].endswith("stopped")

    def test_k19_stop_while_waiting(self, page):
        notes = []
        with page.engine.turn:  # somebody else's answer
            for row in page.ask("Who?", None, dict(SETTINGS), "visitor"):
                notes.append(row[3])
                page.stop("visitor")
        assert notes[0] == "waiting for the answers of others …"
        assert notes[-1].endswith("stopped")
        assert row[1].conversation.turns == []

    def test_k19_one_question_of_a_visitor_at_a_time(self, page, state):
        first = page.ask("Who?", state, dict(SETTINGS), "visitor")
        next(first)
        chat, _, _, note = self.last(page, "Where?", state)
        assert (chat, note) == ([], "⚠ the last question is not answered yet; wait, or stop it")
        assert [*first][-1][0][0]["content"] == "Who?"

    @pytest.mark.parametrize(
        ("settings", "note"),
        [
            ({"max_new_tokens": "abc"}, "⚠ --max_new_tokens: 'abc'; use a number from 1 to 1000000000"),
            ({"temperature": True}, "⚠ --temperature: True; use a number from 0.01 to 100"),
            ({"temperature": float("nan")}, "⚠ --temperature: nan; use a number from 0.01 to 100"),
            ({"temperature": 1e-9}, "⚠ --temperature: 1e-09; use a number from 0.01 to 100"),
            ({"top_p": 10**400}, "⚠ --top_p: 1000"),
            ({"repetition_penalty": None}, "⚠ --repetition_penalty: None; use a number from 0.1 to 10"),
            ({"do_sample": 1}, "⚠ --do_sample: 1; use true or false"),
            ({"truncate": ["left"]}, "⚠ --truncate: ['left']; use one of middle, left"),
            ({"system": 5}, "⚠ system prompt: 5; use text"),
        ],
    )
    def test_k19_values_of_a_request(self, settings, note, page):
        assert self.last(page, "Who?", None, **settings)[3].startswith(note)
        assert page.stops == {}

    @pytest.mark.parametrize(
        ("system", "kept"), [("Answer in French. ", "Answer in French."), (" ", None), (None, None)]
    )
    def test_k19_a_system_prompt(self, system, kept, page, tokenizer):
        _, state, _, _ = self.last(page, "Who?", None, system=system)
        assert state.conversation.system == kept
        text = tokenizer.decode(state.conversation.prompt_ids("Where?"))
        assert text.startswith("Answer in French.\nUSER: Who?" if kept else "A chat between a curious user")

    def test_a_new_chat_keeps_the_document(self, page, state):
        _, state, _, _ = self.last(page, "Who?", state)
        kept, shown, chat = page.forget(state)
        assert (kept.document, kept.name, kept.conversation.turns, chat) == ("The dog.", "a.txt", [], [])
        assert kept.conversation.documents == ["The dog."]
        assert "a.txt: <b>" in shown
        assert page.forget(None) == (None, page.blank(), [])

    def test_stop_events_do_not_accumulate(self, page):
        for visitor in range(50):
            list(page.ask("Who?", None, {**SETTINGS, "max_new_tokens": 1}, str(visitor)))
        assert page.stops == {}
