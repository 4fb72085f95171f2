"""What does the web page look like? A document, the share of the context that it takes, and a chat about it."""

import html
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from component.error import UserError, first_line
from component.inference.context import TRUNCATIONS
from component.inference.conversation import Conversation
from component.inference.engine import Engine
from component.inference.text_file import read_text_file

TITLE = "LongQLoRA: chat about a long document"
CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto}
.meter {height: 10px; border-radius: 5px; background: var(--border-color-primary); overflow: hidden; margin: 4px 0}
.meter div {height: 100%; background: #2563eb}
.meter.full div {background: #dc2626}
.quiet {color: var(--body-text-color-subdued); font-size: 90%}
footer {display: none !important}
"""
FILE_TYPES = [".txt", ".md", ".pdf", ".py", ".json", ".csv", ".html", ".tex", ".rst", ".log"]
LARGEST_FILE = "50mb"
REFUSE = "refuse"
REFUSAL = "⚠ "  # prefix of the note below the chat if a question was refused


def import_gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise UserError("web.py needs the package gradio; pip install -r requirements.txt") from error
    return gradio


def meter(tokens: int, context: int, what: str) -> str:
    """HTML of a bar that shows the share of the context that `what` takes."""
    share = tokens / context
    kind = "meter full" if share >= 1 else "meter"
    advice = " It does not fit: choose below how to truncate it." if share >= 1 else ""
    return (
        f"<div>{html.escape(what)}: <b>{tokens:,}</b> of {context:,} tokens of context ({share:.0%}).{advice}</div>"
        f'<div class="{kind}"><div style="width: {min(share, 1):.1%}"></div></div>'
    )


class Page:
    """Event handlers of the page; a visitor's state is a dictionary of `conversation`, `document` and its `name`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stops: dict[str, threading.Event] = {}

    def blank(self) -> str:
        return f'<div class="quiet">No document. The context is {self.engine.context:,} tokens.</div>'

    def open_document(self, path: str | None) -> tuple[dict | None, str, list]:
        """(state, meter, empty chat) after a file was uploaded, or removed (None)."""
        if path is None:
            return None, self.blank(), []
        try:
            text = read_text_file(path, "document")
        except UserError as error:
            message = str(error).replace(str(path), Path(path).name)
            return None, f"<div>{html.escape(message)}</div>", []
        name = Path(path).name
        return {"document": text, "name": name}, self._document_meter(text, name), []

    def forget(self, state: dict | None) -> tuple[dict | None, str, list]:
        """(state, meter, empty chat) of a new conversation about the same document."""
        if not state or not state.get("document"):
            return None, self.blank(), []
        kept = {"document": state["document"], "name": state["name"]}
        return kept, self._document_meter(**kept), []

    def stop(self, visitor: str) -> None:
        if visitor in self.stops:
            self.stops[visitor].set()

    def ask(
        self, question: str, chat: list, state: dict | None, settings: dict, visitor: str
    ) -> Iterator[tuple[list, dict, str, str]]:
        """Yield (chat, state, meter, note below the chat) as the answer grows."""
        state = dict(state or {})
        conversation = state.setdefault("conversation", self._conversation(state))
        stop = self.stops[visitor] = threading.Event()
        shown = [*chat, {"role": "user", "content": question}]
        bar = self._usage_meter(conversation, state)
        try:
            for answer in self.engine.answer(conversation, question, settings, stop.is_set):
                note = answer.notice or ("" if answer.text else "reading …")
                yield [*shown, {"role": "assistant", "content": answer.text}], state, bar, note
            ending = " · ".join(part for part in (answer.notice, "stopped" if stop.is_set() else "") if part)
            usage = self.engine.usage(conversation)
            final = [*shown, {"role": "assistant", "content": answer.text or "(nothing)"}]
            yield final, state, self._usage_meter(conversation, state), f"{usage}{' · ' if ending else ''}{ending}"
        except (UserError, RuntimeError) as error:  # RuntimeError: out of memory; a shorter question may fit
            yield chat, state, bar, f"{REFUSAL}{first_line(error)}"
        finally:
            stop.set()
            if self.stops.get(visitor) is stop:
                del self.stops[visitor]

    def _conversation(self, state: dict) -> Conversation:
        conversation = self.engine.conversation()
        if state.get("document"):
            conversation.documents.append(state["document"])
        return conversation

    def _document_meter(self, document: str, name: str) -> str:
        return meter(self.engine.conversation().tokens_of(document), self.engine.context, name)

    def _usage_meter(self, conversation: Conversation, state: dict) -> str:
        if not conversation.turns:
            return self._document_meter(state["document"], state["name"]) if state.get("document") else self.blank()
        name = f"{state['name']} and the chat" if state.get("document") else "the chat"
        return meter(conversation.used_tokens(), self.engine.context, name)


def build_page(engine: Engine) -> Any:
    """The page as Gradio blocks, ready to launch."""
    gradio, page, flags = import_gradio(), Page(engine), engine.flags
    with gradio.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        state = gradio.State(None)
        gradio.Markdown(f"## {TITLE}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                upload = gradio.File(
                    label="Document (text or PDF)", file_types=FILE_TYPES, height=120, elem_id="document"
                )
                bar = gradio.HTML(page.blank(), elem_id="meter")
                settings = _settings(gradio, flags, engine.context)
            with gradio.Column(scale=2, min_width=400):
                chat = gradio.Chatbot(
                    show_label=False,
                    height=520,
                    elem_id="chat",
                    placeholder="Upload a document and ask about it",
                    buttons=["copy"],
                )
                note = gradio.Markdown("", elem_id="note", elem_classes="quiet")
                question = gradio.Textbox(  # with more than one line at first, Enter would not send
                    show_label=False,
                    placeholder="Your question; Enter sends it",
                    lines=1,
                    max_lines=8,
                    elem_id="question",
                )
                with gradio.Row():
                    send = gradio.Button("Send", variant="primary", elem_id="send")
                    stop = gradio.Button("Stop", variant="stop", interactive=False, elem_id="stop")
                    clear = gradio.Button("New chat", elem_id="clear")
        _connect(gradio, page, (state, upload, bar, chat, note, question, send, stop, clear), settings)
    return blocks


def _settings(gradio: Any, flags: Any, context: int) -> dict[str, Any]:
    """The generation settings, keyed by flag name."""
    with gradio.Accordion("Settings", open=True):
        longest = min(flags.max_new_tokens, context)
        return {
            "max_new_tokens": gradio.Slider(1, min(4096, context), longest, step=1, label="Maximum new tokens"),
            "do_sample": gradio.Checkbox(flags.do_sample, label="Sample (off: greedy decoding)"),
            "temperature": gradio.Slider(0.05, 2, flags.temperature, step=0.05, label="Temperature"),
            "top_p": gradio.Slider(0.05, 1, flags.top_p, step=0.05, label="Top-p"),
            "repetition_penalty": gradio.Slider(1, 2, flags.repetition_penalty, step=0.05, label="Repetition penalty"),
            "truncate": gradio.Radio(
                [REFUSE, *TRUNCATIONS],
                value=flags.truncate or REFUSE,
                label="If a prompt is longer than the context",
            ),
        }


def _connect(gradio: Any, page: Page, parts: tuple, settings: dict[str, Any]) -> None:
    state, upload, bar, chat, note, question, send, stop, clear = parts
    names = list(settings)

    def ask(text, shown, kept, request: gradio.Request, *values):
        if not (text or "").strip():
            yield shown, kept, gradio.skip(), "", gradio.skip(), gradio.skip(), gradio.skip()
            return
        chosen = dict(zip(names, values, strict=True))
        chosen["truncate"] = None if chosen["truncate"] == REFUSE else chosen["truncate"]
        busy = (gradio.update(value=""), gradio.update(interactive=False), gradio.update(interactive=True))
        for row in page.ask(text, shown or [], kept, chosen, request.session_hash):
            yield *row, *busy
        refused = gradio.update(value=text) if row[3].startswith(REFUSAL) else gradio.skip()  # back into the text box
        yield *row, refused, gradio.update(interactive=True), gradio.update(interactive=False)

    def halt(request: gradio.Request) -> None:
        page.stop(request.session_hash)

    ask.__annotations__["request"] = gradio.Request
    outputs = [chat, state, bar, note, question, send, stop]
    for event in (send.click, question.submit):
        event(ask, [question, chat, state, *settings.values()], outputs, concurrency_limit=4, show_progress="hidden")
    stop.click(halt, None, None, queue=False)
    upload.change(page.open_document, upload, [state, bar, chat], show_progress="hidden")
    for event in (clear.click, chat.clear):
        event(page.forget, state, [state, bar, chat], show_progress="hidden")


def serve(engine: Engine, host: str, port: int) -> None:
    """Start the server and return.

    Raises:
        UserError: the server cannot listen on the address.
    """
    gradio = import_gradio()
    fonts = ["system-ui", "sans-serif"]  # of the visitor's machine: nothing is downloaded
    theme = gradio.themes.Default(font=fonts, font_mono=["monospace"])
    try:
        build_page(engine).launch(
            server_name=host,
            server_port=port,
            share=False,
            theme=theme,
            css=CSS,
            max_file_size=LARGEST_FILE,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"--port: cannot listen on {host}:{port} ({error}); name another port") from error
