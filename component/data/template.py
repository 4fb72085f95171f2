"""How is a chat template filled in? By transformers, within a bounded time.

A template comes with a model, from anybody, and is a program: two nested loops of 100,000 passes each do not end.
"""

import ctypes
import threading

from transformers import PreTrainedTokenizerBase

from component.error import UserError, first_line

SECONDS = 10.0  # the longest conversations take milliseconds
_endless: set[str] = set()  # templates that took longer: the next of a million records does not wait for them again


class _TookTooLong(Exception):
    pass


def fill_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], opens_answer: bool = False
) -> str:
    """The text that the tokenizer's chat template makes of `messages`.

    Args:
        messages: {"role", "content"} each.
        opens_answer: whether what opens the assistant's next answer follows.

    Raises:
        UserError: the template rejects the conversation, whatever it raises, or takes longer than SECONDS.
    """
    name, template = tokenizer.name_or_path or "the tokenizer", str(tokenizer.chat_template)
    endless = UserError(
        f"template: the chat template of {name} was not filled in after {SECONDS:g} seconds; correct it, or use a "
        "model that has another"
    )
    if template in _endless:
        raise endless
    try:
        with _limited_time(SECONDS):
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_answer)  # type: ignore
    except _TookTooLong as error:
        _endless.add(template)
        raise endless from error
    except Exception as error:  # jinja's own, and whatever the template raises
        reason = first_line(error)
        raise UserError(f"template: the tokenizer's chat template rejects a conversation ({reason})") from error


class _limited_time:
    """Raises _TookTooLong in this thread if the block takes longer than `seconds`; it must run Python code.

    No signal: those reach the main thread alone, and the page's answers come from others.
    """

    def __init__(self, seconds: float):
        self.lock, self.is_over, self.thread = threading.Lock(), False, threading.get_ident()
        self.timer = threading.Timer(seconds, self._interrupt)
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_) -> None:
        with self.lock:
            self.is_over = True
        self.timer.cancel()

    def _interrupt(self) -> None:
        with self.lock:
            if not self.is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(_TookTooLong))
