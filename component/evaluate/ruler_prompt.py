"""How does a question of RULER become a prompt that fills a length? Completion or chat, with room for the answer.

As published, prompt and answer share the length, and the beginning of the answer is given. Published samples are
shortened in steps of many units, until they fit; these by one unit, so that no further unit would fit.
"""

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from component.data.chat_template import encode_conversation
from component.data.text import text_ids
from component.error import UserError
from component.evaluate.ruler_task import TASKS, Question
from component.evaluate.ruler_words import generated_text, read_text

COMPLETION = "completion"
FEW = 64  # units by which tokens per unit are first estimated


class Sample(NamedTuple):
    ids: list[int]  # the prompt
    references: list[str]
    answer_tokens: int


class SampleMaker:
    """Makes samples with one tokenizer.

    Args:
        template: COMPLETION, or a template of component/data/chat_template.py.
        haystack: path or hub id of texts; None for generated sentences.
        longest: the longest length, in tokens: of the haystack as many words are kept.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, seed: int, haystack: str | None, longest: int
    ) -> None:
        self.tokenizer, self.template, self.seed = tokenizer, template, seed
        self.words = read_text(haystack, longest) if haystack else generated_text(longest)

    def sample(self, task: str, length: int, number: int) -> Sample:
        """The sample of this number; the same whatever else is made.

        Raises:
            UserError: even the smallest one does not fit into `length` tokens.
        """
        chosen = TASKS[task]
        most = len(self.words) if chosen.uses_haystack else chosen.most
        room = self._room(task, length, number)
        units = most_units(lambda units: self._tokens(task, length, number, units), room, chosen.least, most)
        question = self.question(task, length, number, units)
        return Sample(self.prompt_ids(question), question.references, chosen.answer_tokens)

    def check(self, task: str, length: int, samples: int) -> None:
        """Refuse a length into which one of the first `samples` samples does not fit.

        Raises:
            UserError: it names the length, the task and the tokens needed.
        """
        for number in range(samples):
            room = self._room(task, length, number)
            if self._tokens(task, length, number, TASKS[task].least) < room / 2:
                return  # the others differ by less

    def _room(self, task: str, length: int, number: int) -> int:
        """Tokens for the prompt: those that the answer leaves."""
        room = length - TASKS[task].answer_tokens
        if (smallest := self._tokens(task, length, number, TASKS[task].least)) > room:
            raise UserError(
                f"--lengths: {length} tokens are too few for {task}; with this tokenizer it needs about "
                f"{smallest + TASKS[task].answer_tokens}, answer included; use longer prompts, or leave the task out "
                "of --tasks"
            )
        return room

    def _tokens(self, task: str, length: int, number: int, units: int) -> int:
        return len(self.prompt_ids(self.question(task, length, number, units)))

    def question(self, task: str, length: int, number: int, units: int) -> Question:
        return TASKS[task].build(f"{self.seed} {task} {length} {number}", units, length, self.words)

    def prompt_ids(self, question: Question) -> list[int]:
        if self.template == COMPLETION:
            text = f"{question.text} {question.prefix}"
            ids = text_ids(self.tokenizer, text, add_special_tokens=True)  # with <s>, if the tokenizer adds it
            return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids
        asked = encode_conversation(self.tokenizer, [(question.text, None)], None, self.template)[0]
        return asked + text_ids(self.tokenizer, question.prefix)


def most_units(tokens: Callable[[int], int], room: int, least: int, most: int | None) -> int:
    """The number of units whose tokens fit into `room`, while one more unit would not; `least` units fit.

    Tokens grow nearly in proportion to units, so a few steps along the slope take the place of a binary search.

    Args:
        tokens: of a text of so many units.
        most: the largest number allowed.
    """
    fits, bursts = least, (most or 2 * room + least) + 1  # of coded words, some units are rounded away
    last, before = least, tokens(least)
    slope = max((tokens(min(least + FEW, bursts)) - before) / FEW, 0.01)
    for step in range(bursts):
        if bursts - fits == 1:
            break
        guess = last + round((room - before) / slope) if step < 8 else (fits + bursts) // 2
        last = min(max(guess, fits + 1), bursts - 1)
        before = tokens(last)
        fits, bursts = (last, bursts) if before <= room else (fits, last)
    return fits
