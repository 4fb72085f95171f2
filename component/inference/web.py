"""What does the web page look like, and how is it served? A document, the context that it takes, a chat about it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from component.error import UserError
from component.inference.engine import Engine
from component.inference.flags import TRUNCATIONS
from component.inference.origin import RequestCheck, own_names
from component.inference.page import REFUSAL, Page

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
MOST_SESSIONS = 64  # the state of the one unused longest goes first
REFUSE = "refuse"


def import_gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise UserError("web.py needs the package gradio; pip install -r requirements.txt") from error
    return gradio


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
        _connect(gradio, page, blocks, (state, upload, bar, chat, note, question, send, stop, clear), settings)
    return blocks


def _settings(gradio: Any, flags: Any, context: int) -> dict[str, Any]:
    """The generation settings, keyed by flag name."""
    with gradio.Accordion("Settings", open=True):
        longest = min(flags.max_new_tokens, context)

        def slider(name: str, least: float, most: float, label: str) -> Any:
            value = getattr(flags, name)
            return gradio.Slider(min(least, value), max(most, value), value, step=0.01, label=label)

        return {
            "max_new_tokens": gradio.Slider(
                1, max(min(4096, context), longest), longest, step=1, label="Maximum new tokens"
            ),
            "do_sample": gradio.Checkbox(flags.do_sample, label="Sample (off: greedy decoding)"),
            "temperature": slider("temperature", 0.05, 2, "Temperature"),
            "top_p": slider("top_p", 0.05, 1, "Top-p"),
            "repetition_penalty": slider("repetition_penalty", 1, 2, "Repetition penalty"),
            "system": gradio.Textbox(
                flags.system or "",
                label="System prompt",
                placeholder="empty: that of the chat template",
                max_lines=6,
                elem_id="system",
            ),
            "truncate": gradio.Radio(
                [REFUSE, *TRUNCATIONS],
                value=flags.truncate or REFUSE,
                label="If a prompt is longer than the context",
            ),
        }


def _connect(gradio: Any, page: Page, blocks: Any, parts: tuple, settings: dict[str, Any]) -> None:
    state, upload, bar, chat, note, question, send, stop, clear = parts
    names = list(settings)

    def ask(text, kept, request: gradio.Request, *values):
        text = text if isinstance(text, str) else ""
        if not text.strip():
            yield gradio.skip(), kept, gradio.skip(), "", gradio.skip(), gradio.skip(), gradio.skip()
            return
        chosen = dict(zip(names, values, strict=True))
        chosen["truncate"] = None if chosen["truncate"] == REFUSE else chosen["truncate"]
        busy = (gradio.update(value=""), gradio.update(interactive=False), gradio.update(interactive=True))
        for row in page.ask(text, kept, chosen, request.session_hash):
            yield *row, *busy
        refused = gradio.update(value=text) if row[3].startswith(REFUSAL) else gradio.skip()  # back into the text box
        yield *row, refused, gradio.update(interactive=True), gradio.update(interactive=False)

    def halt(request: gradio.Request) -> None:
        page.stop(request.session_hash)

    def opened(path, request: gradio.Request):
        try:
            return page.open_document(path, request.session_hash)
        finally:
            if path is not None:  # its text is kept
                Path(path).unlink(missing_ok=True)

    for handler in (ask, halt, opened):
        handler.__annotations__["request"] = gradio.Request
    outputs = [chat, state, bar, note, question, send, stop]
    for event in (send.click, question.submit):
        event(  # Engine and Page bound and check: those who wait must not keep others from asking or stopping
            ask,
            [question, state, *settings.values()],
            outputs,
            concurrency_limit=None,
            show_progress="hidden",
            preprocess=False,
        )
    blocks.unload(halt)  # the visitor left
    stop.click(halt, None, None, queue=False)
    upload.change(opened, upload, [state, bar, chat], concurrency_limit=None, show_progress="hidden")
    for event in (clear.click, chat.clear):
        event(page.forget, state, [state, bar, chat], concurrency_limit=None, show_progress="hidden")


def serve(
    engine: Engine, host: str, port: int, *, auth: tuple[str, str] | None = None, allowed_hosts: Iterable[str] = ()
) -> None:
    """Start the server and return.

    Args:
        auth: user and password that every visitor must give.
        allowed_hosts: names that visitors use for this server, besides its own.

    Raises:
        UserError: the server cannot listen on the address.
    """
    gradio = import_gradio()
    from starlette.middleware import Middleware

    fonts = ["system-ui", "sans-serif"]  # of the visitor's machine: nothing is downloaded
    theme = gradio.themes.Default(font=fonts, font_mono=["monospace"])
    check = Middleware(RequestCheck, own_names(host, allowed_hosts), {name.lower() for name in allowed_hosts})
    try:
        build_page(engine).launch(
            server_name=host,
            server_port=port,
            share=False,
            theme=theme,
            css=CSS,
            auth=auth,
            app_kwargs={"middleware": [check]},
            max_file_size=LARGEST_FILE,
            state_session_capacity=MOST_SESSIONS,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"--port: cannot listen on {host}:{port} ({error}); name another port") from error
