"""How do several web visitors chat with one model? One answer at a time, streamed, and stopped on request."""

import argparse
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from component.error import UserError
from component.inference.context import describe_context, fit_prompt
from component.inference.conversation import Conversation
from component.inference.flags import check_sampling
from component.inference.generate import generate
from component.inference.kv_cache import PromptCache
from component.loading import recorded_template
from component.rope import context_length


@dataclass
class Answer:
    """The answer so far; `notice` tells the visitor if the prompt was truncated."""

    text: str
    notice: str = ""


@dataclass
class Engine:
    """One model and one KV cache for all visitors; a prefix shared with the previous prompt is not recomputed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    flags: argparse.Namespace
    cache: PromptCache = field(init=False)
    turn: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.cache = PromptCache(self.model.config, self.flags.cache_implementation)

    @property
    def context(self) -> int:
        return context_length(self.model.config)

    def conversation(self) -> Conversation:
        return Conversation(self.tokenizer, recorded_template(self.tokenizer))

    def usage(self, conversation: Conversation) -> str:
        return describe_context(self.model, conversation.used_tokens(), self.cache)

    def answer(
        self, conversation: Conversation, question: str, settings: dict, should_stop: Callable[[], bool]
    ) -> Iterator[Answer]:
        """Yield the growing answer; when it ends, it is added to the conversation.

        Args:
            settings: sampling flags and `truncate` that override those of the program.
            should_stop: called after every token, from another thread.

        Raises:
            UserError: invalid settings, or a prompt longer than the context.
        """
        flags = argparse.Namespace(**{**vars(self.flags), **settings})
        check_sampling(flags)
        prompt_ids = conversation.prompt_ids(question)
        opening = conversation.opening_tokens()
        kept, cut = fit_prompt(prompt_ids, self.context, flags.max_new_tokens, flags.truncate, opening)
        notice = f"{cut} of {len(prompt_ids)} tokens were cut ({flags.truncate})" if cut else ""
        answer = Answer("", notice)
        yield answer
        for piece in self._pieces(kept, flags, should_stop):
            answer = Answer(answer.text + piece, notice)
            yield answer
        if answer.text.strip():
            conversation.add(question, answer.text)

    def _pieces(
        self, prompt_ids: list[int], flags: argparse.Namespace, should_stop: Callable[[], bool]
    ) -> Iterator[str]:
        """Yield pieces of text generated in a thread of their own, which stops when this iterator is closed."""
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        is_closed = threading.Event()

        def work() -> None:
            try:
                with self.turn:
                    generate(
                        self.model,
                        self.tokenizer,
                        prompt_ids,
                        flags,
                        pieces.put,
                        cache=self.cache,
                        should_stop=lambda: is_closed.is_set() or should_stop(),
                    )
                pieces.put(None)
            except BaseException as error:  # raised again in the consumer's thread
                if not isinstance(error, UserError):
                    self.cache.forget()
                pieces.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            is_closed.set()
