"""What does the page do for its visitors? It reads their documents, answers, stops, and keeps each one's state."""

import html
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from component.error import UserError, first_line
from component.inference.conversation import Conversation
from component.inference.engine import Engine
from component.inference.text_file import read_text_file

READERS = 3  # documents read at a time
BUSY_SECONDS = 4  # a document that waits longer for its turn is refused
REFUSAL = "⚠ "  # prefix of the note below the chat if a question was refused


def meter(tokens: int, context: int, what: str) -> str:
    """HTML of a bar that shows the share of the context that `what` takes."""
    share = tokens / context
    kind = "meter full" if share >= 1 else "meter"
    advice = " It does not fit: choose below how to truncate it." if share >= 1 else ""
    return (
        f"<div>{html.escape(what)}: <b>{tokens:,}</b> of {context:,} tokens of context ({share:.0%}).{advice}</div>"
        f'<div class="{kind}"><div style="width: {min(share, 1):.1%}"></div></div>'
    )


@dataclass
class State:
    """What the server keeps of a visitor; nothing of it comes back from the browser."""

    conversation: Conversation
    document: str = ""
    name: str = ""
    tokens: int = 0  # of the document
    chat: list[dict[str, str]] = field(default_factory=list)  # as shown


class Page:
    """Event handlers of the page; a visitor is the name of a browser's session."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stops: dict[str, threading.Event] = {}
        self.reading: dict[str, str] = {}  # visitor -> path
        self.readers = threading.Semaphore(READERS)

    def blank(self) -> str:
        return f'<div class="quiet">No document. The context is {self.engine.context:,} tokens.</div>'

    def open_document(self, path: str | None, visitor: str) -> tuple[State | None, str, list]:
        """(state, meter, empty chat) after a file was uploaded, or removed (None)."""
        if path is None:
            return None, self.blank(), []
        try:
            text, tokens = self._read(path, visitor)
        except UserError as error:
            message = str(error).replace(str(path), Path(path).name)
            return None, f"<div>{html.escape(message)}</div>", []
        return self._fresh(text, Path(path).name, tokens)

    def _read(self, path: str, visitor: str) -> tuple[str, int]:
        """(text, tokens) of a document; one per visitor and READERS of all visitors at a time."""
        name = Path(path).name
        if self.reading.setdefault(visitor, path) is not path:
            raise UserError(f"{name}: your previous document is still being read; upload it again in a minute")
        try:
            if not self.readers.acquire(timeout=BUSY_SECONDS):
                raise UserError(f"{name}: documents of other visitors are being read; upload it again in a minute")
            try:
                text = read_text_file(path, "document")
                return text, self.engine.count_tokens(text, name)
            finally:
                self.readers.release()
        finally:
            del self.reading[visitor]

    def _fresh(self, document: str, name: str, tokens: int) -> tuple[State, str, list]:
        state = State(self.engine.conversation(), document, name, tokens)
        if document:
            state.conversation.documents.append(document)
        return state, self._meter(state), []

    def forget(self, state: State | None) -> tuple[State | None, str, list]:
        """(state, meter, empty chat) of a new conversation about the same document."""
        if state is None or not state.document:
            return None, self.blank(), []
        return self._fresh(state.document, state.name, state.tokens)

    def stop(self, visitor: str) -> None:
        if visitor in self.stops:
            self.stops[visitor].set()

    def ask(
        self, question: str, state: State | None, settings: dict, visitor: str
    ) -> Iterator[tuple[list, State, str, str]]:
        """Yield (chat, state, meter, note below the chat) as the answer grows.

        Args:
            settings: those of `Engine.answer`, and `system`.
        """
        state = state or State(self.engine.conversation())
        stop, bar = threading.Event(), self._meter(state)
        if self.stops.setdefault(visitor, stop) is not stop:
            yield state.chat, state, bar, f"{REFUSAL}the last question is not answered yet; wait, or stop it"
            return
        shown = [*state.chat, {"role": "user", "content": question}]
        try:
            if "system" in settings:
                state.conversation.system = system_prompt(settings.pop("system"))
            for answer in self.engine.answer(state.conversation, question, settings, stop.is_set):
                doing = "waiting for the answers of others …" if answer.is_waiting else "reading …"
                note = answer.notice or ("" if answer.text else doing)
                yield [*shown, {"role": "assistant", "content": answer.text}], state, bar, note
            ending = " · ".join(part for part in (answer.notice, "stopped" if stop.is_set() else "") if part)
            usage = self.engine.usage(state.conversation)
            if answer.text.strip():  # else neither question nor answer are part of the conversation
                state.chat = [*shown, {"role": "assistant", "content": answer.text}]
            else:
                ending = ending or "no answer"
            yield state.chat, state, self._meter(state), f"{usage}{' · ' if ending else ''}{ending}"
        except (UserError, RuntimeError) as error:  # RuntimeError: out of memory; a shorter question may fit
            yield state.chat, state, bar, f"{REFUSAL}{first_line(error)}"
        finally:
            stop.set()
            del self.stops[visitor]

    def _meter(self, state: State) -> str:
        if state.conversation.turns:
            name = f"{state.name} and the chat" if state.document else "the chat"
            return meter(state.conversation.used_tokens(), self.engine.context, name)
        return meter(state.tokens, self.engine.context, state.name) if state.document else self.blank()


def system_prompt(text: object) -> str | None:
    """The system prompt of a request; None, for the template's own, if it is blank."""
    if text is not None and not isinstance(text, str):
        raise UserError(f"system prompt: {repr(text)[:100]}; use text")
    return (text or "").strip() or None
