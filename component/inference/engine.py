"""How do several web visitors chat with one model? One answer at a time, streamed, and stopped on request."""

import argparse
import queue
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from component.data.text import as_text, text_ids
from component.error import UserError
from component.inference.context import describe_context, fit_prompt
from component.inference.conversation import Conversation
from component.inference.flags import BOUNDS, TRUNCATIONS, check_sampling
from component.inference.generate import cache_from_flags, generate
from component.inference.kv_cache import PromptCache
from component.inference.load import new_conversation
from component.rope import context_length

MOST_WAITING = 16  # answers under way or waited for
MOST_CONTEXTS = 4  # a longer document is refused, even if it would be truncated
CHARACTERS_PER_TOKEN = 8  # of a text without many blanks; bounds the memory for tokenizing it
COUNTED_CHARACTERS = 100_000  # tokenized at once while counting
UPDATE_SECONDS = 0.1  # between updates of an answer, for each of which a browser renders the whole chat
HEARTBEAT_SECONDS = 0.5  # without a new piece, the same answer is yielded again: who left is noticed


class StoppedInPrefill(Exception):
    """Nobody waits for the prompt that is being read."""


class KnownTokens:
    """A tokenizer that keeps the ids of the texts it has seen: a document is not tokenized again at each question."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, most_characters: int) -> None:
        self.tokenizer, self.most_characters = tokenizer, most_characters
        self.known: dict[tuple, array] = {}
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        if options.get("return_offsets_mapping"):
            return self.tokenizer(text, **options)
        key = (text, *sorted(options.items()))
        if key not in self.known:
            if self.characters + len(text) > 2 * self.most_characters:  # questions that were refused are kept too
                self.known.clear()
                self.characters = 0
            call, (written,) = as_text(self.tokenizer, [text])
            self.known[key] = array("I", call(written, **options).input_ids)
            self.characters += len(text)
        return SimpleNamespace(input_ids=self.known[key].tolist())


@dataclass
class Answer:
    """The answer so far.

    `notice` tells the visitor if the prompt was truncated; `is_waiting` is true as long as others' answers come first.
    """

    text: str
    notice: str = ""
    is_waiting: bool = True


@dataclass
class Engine:
    """One model and one KV cache for all visitors; a prefix shared with the previous prompt is not recomputed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    flags: argparse.Namespace
    cache: PromptCache = field(init=False)
    turn: threading.Lock = field(default_factory=threading.Lock)
    tokenizing: threading.Lock = field(default_factory=threading.Lock)  # one long prompt's memory at a time
    places: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(MOST_WAITING))

    def __post_init__(self) -> None:
        self.cache = cache_from_flags(self.model, self.flags)

    @property
    def context(self) -> int:
        return context_length(self.model.config)

    @property
    def most_tokens(self) -> int:
        """Of a document."""
        return MOST_CONTEXTS * self.context

    @property
    def most_characters(self) -> int:
        """Of a conversation with its documents."""
        return CHARACTERS_PER_TOKEN * self.most_tokens

    def conversation(self) -> Conversation:
        tokenizer: Any = KnownTokens(self.tokenizer, self.most_characters)
        return new_conversation(tokenizer, self.flags)

    def usage(self, conversation: Conversation) -> str:
        return describe_context(self.model, conversation.used_tokens(), self.cache)

    def count_tokens(self, text: str, name: str) -> int:
        """Number of tokens of a document; of a long one, that of its parts, which may be a few more.

        Raises:
            UserError: the document is too long; the count ends where that is known.
        """
        most = f"{MOST_CONTEXTS} times the model's context of {self.context:,} tokens"
        if len(text) > self.most_characters:
            raise UserError(f"{name} has {len(text):,} characters, too many for {most}; split it")
        tokens = 0
        for start in range(0, len(text), COUNTED_CHARACTERS):
            part = text[start : start + COUNTED_CHARACTERS]
            tokens += len(text_ids(self.tokenizer, part))
            if tokens > self.most_tokens:
                raise UserError(f"{name} has more than {self.most_tokens:,} tokens, {most}; split it")
        return tokens

    def answer(
        self, conversation: Conversation, question: str, settings: dict, should_stop: Callable[[], bool]
    ) -> Iterator[Answer]:
        """Yield the growing answer; when it ends, it is added to the conversation.

        Args:
            settings: sampling flags and `truncate` that override those of the program.
            should_stop: called while waiting, between layers of a prefill, and after every token, from another thread.

        Raises:
            UserError: invalid settings, a prompt longer than the context, or too many visitors.
        """
        flags = argparse.Namespace(**{**vars(self.flags), **checked_types(settings)})
        check_sampling(flags)
        if conversation.characters() + len(question) > self.most_characters:
            raise UserError(
                f"the conversation would have more than {self.most_characters:,} characters, which this model's "
                "context cannot hold; start a new chat, or ask about less text"
            )
        with self.tokenizing:
            prompt_ids = conversation.prompt_ids(question)
            opening = conversation.opening_tokens()
        kept, cut = fit_prompt(prompt_ids, self.context, flags.max_new_tokens, flags.truncate, opening)
        answer = Answer("", f"{cut} of {len(prompt_ids)} tokens were cut ({flags.truncate})" if cut else "")
        yield answer
        for piece in self._pieces(kept, flags, should_stop):
            answer = Answer(answer.text + (piece or ""), answer.notice, piece is None)
            yield answer
        if answer.text.strip():
            conversation.add(question, answer.text)

    def _pieces(
        self, prompt_ids: list[int], flags: argparse.Namespace, should_stop: Callable[[], bool]
    ) -> Iterator[str | None]:
        """Yield pieces of text generated in a thread of their own, which stops when this iterator is closed.

        None while others' answers are waited for, and an empty piece every HEARTBEAT_SECONDS without text.
        """
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        is_closed, has_turn = threading.Event(), threading.Event()

        def is_over() -> bool:
            return is_closed.is_set() or should_stop()

        def work() -> None:
            try:
                with self._turn(is_over) as is_mine:
                    if is_mine:
                        has_turn.set()
                        self._generate(prompt_ids, flags, pieces.put, is_over)
                pieces.put(None)
            except BaseException as error:  # raised again in the consumer's thread
                pieces.put(error)
            finally:
                self.places.release()

        if not self.places.acquire(blocking=False):
            raise UserError(f"busy: {MOST_WAITING} questions wait for their answers; ask again in a minute")
        threading.Thread(target=work, daemon=True).start()
        next_update = 0.0  # the first piece is yielded at once
        try:
            while True:
                try:
                    piece = pieces.get(timeout=HEARTBEAT_SECONDS)
                except queue.Empty:
                    yield "" if has_turn.is_set() else None
                    continue
                text = ""
                with suppress(queue.Empty):
                    while isinstance(piece, str):
                        text += piece
                        if (left := next_update - time.monotonic()) <= 0:
                            break
                        piece = pieces.get(timeout=left)
                if text:
                    yield text
                    next_update = time.monotonic() + UPDATE_SECONDS
                if piece is None:
                    return
                if isinstance(piece, BaseException):
                    raise piece
        finally:
            is_closed.set()

    @contextmanager
    def _turn(self, is_over: Callable[[], bool]) -> Iterator[bool]:
        """Whether the model is this visitor's inside of the block; False if the question was given up before."""
        while not (is_mine := self.turn.acquire(timeout=0.05)) and not is_over():
            pass
        try:
            yield is_mine and not is_over()
        finally:
            if is_mine:
                self.turn.release()

    def _generate(
        self,
        prompt_ids: list[int],
        flags: argparse.Namespace,
        write: Callable[[str], None],
        is_over: Callable[[], bool],
    ) -> None:
        try:
            with stoppable_prefill(self.model, is_over):
                generate(self.model, self.tokenizer, prompt_ids, flags, write, cache=self.cache, should_stop=is_over)
        except StoppedInPrefill:
            self.cache.forget()
        except UserError:
            raise
        except BaseException:
            self.cache.forget()
            raise


@contextmanager
def stoppable_prefill(model: PreTrainedModel, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Inside of the block, a forward pass of several tokens raises StoppedInPrefill at the next decoder layer."""

    def check(layer: torch.nn.Module, inputs: tuple, options: dict) -> None:
        hidden = inputs[0] if inputs else options["hidden_states"]  # (B, T, C)
        if hidden.shape[1] == 1:
            return
        if hidden.is_cuda:  # else all layers are launched before the first has run
            torch.cuda.synchronize(hidden.device)
        if should_stop():
            raise StoppedInPrefill

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(check, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def checked_types(settings: dict) -> dict:
    """The settings of a request, which may hold any JSON.

    Raises:
        UserError: a value of another type than the flag's, or a number at which sampling fails.
    """
    checked = {}
    for name, value in settings.items():
        if name in BOUNDS:
            least, most = BOUNDS[name]
            is_valid = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
            wanted = f"a number from {least} to {most}"
        elif name == "do_sample":
            is_valid, wanted = isinstance(value, bool), "true or false"
        else:
            is_valid, wanted = value is None or value in TRUNCATIONS, f"one of {', '.join(TRUNCATIONS)}"
        if not is_valid:
            raise UserError(f"--{name}: {repr(value)[:100]}; use {wanted}")
        checked[name] = int(value) if name == "max_new_tokens" else value
    return checked
