"""Can a number be retrieved from a long text? Passkey retrieval (Landmark Attention, arXiv 2305.16300).

A line with a five-digit key is hidden in filler lines, and the prompt ends by asking for it. Prompts are assembled
from tokens, not from text, and the last filler line is truncated, so each prompt has exactly the requested length.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from component.distributed.sequence import sequence_group
from component.distributed.world import own_share
from component.error import UserError
from component.evaluate.split import continue_greedily
from component.inference.generate import generate_greedy
from component.loading import end_ids

INTRODUCTION = "One line of this text holds a pass key. Find it and keep it in mind; the last line asks for it."
FILLER = (
    "\nThe river is wide. The boats are slow.",
    "\nThe hills are far. The clouds are low.",
    "\nWe walk there. We walk back again.",
)
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
KEYS = range(10_000, 100_000)
EXTRA_TOKENS = 3  # generated beyond the key, to see surplus digits


@dataclass
class Prompt:
    ids: list[int]
    key: str
    needle_start: int  # token index; the needle is at the line boundary nearest to the depth
    needle_end: int


@dataclass
class Trial:
    length: int  # requested tokens
    depth: float  # 0: the needle is the first line after the introduction, 1: the last one before the question
    trial: int
    prompt_tokens: int  # actual tokens
    needle_start: int
    expected: str
    answered: str
    is_right: bool


class PromptMaker:
    """Makes passkey prompts with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        start = tokenizer(INTRODUCTION).input_ids  # with <s>, if the tokenizer adds it
        self.start = start[:-1] if start[-1] == tokenizer.eos_token_id else start
        self.lines = [self.tokens_of(line) for line in FILLER]
        self.question = self.tokens_of(QUESTION)

    def tokens_of(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prompt(self, length: int, depth: float, key: str) -> Prompt:
        """A prompt of exactly `length` tokens with `key` at `depth` of the filler.

        Raises:
            UserError: introduction, needle and question do not fit.
        """
        needle = self.tokens_of(NEEDLE.format(key=key))
        room = length - len(self.start) - len(needle) - len(self.question)
        if room < 0:
            raise UserError(f"--lengths: {length} tokens are too few; this tokenizer needs at least {length - room}")
        filler, line_ends = self._filler(room)
        before = min(line_ends, key=lambda end: abs(end - depth * room))
        head = self.start + filler[:before]
        ids = head + needle + filler[before:] + self.question
        return Prompt(ids, key, len(head), len(head) + len(needle))

    def _filler(self, tokens: int) -> tuple[list[int], list[int]]:
        """`tokens` tokens of filler lines, and the line boundaries, start and end included."""
        ids: list[int] = []
        ends = [0]
        while len(ids) < tokens:
            ids += self.lines[(len(ends) - 1) % len(self.lines)]
            ends.append(min(len(ids), tokens))
        return ids[:tokens], ends

    def answer_tokens(self, key: str) -> int:
        """Number of tokens to generate."""
        return len(self.tokens_of(f" {key}.")) + EXTRA_TOKENS


def draw_key(seed: int, length: int, depth: float, trial: int) -> str:
    """The key of a trial; the same whatever other lengths and depths are measured."""
    return str(random.Random(f"{seed} {length} {depth:.6f} {trial}").choice(KEYS))


def is_right(answered: str, key: str) -> bool:
    """Whether the first number in the answer is exactly the key."""
    found = re.search(r"\d+", answered)
    return found is not None and found[0] == key


def even_depths(count: int) -> list[float]:
    """`count` evenly spaced depths from 0 to 1; the middle for a single one."""
    return [0.5] if count == 1 else [step / (count - 1) for step in range(count)]


def run_trials(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: list[int],
    depths: list[float],
    trials: int,
    seed: int,
    offload_cache: bool = False,
) -> Iterator[Trial]:
    """Yield the greedy answer for each length, depth and trial that is this process's.

    Raises:
        UserError: a length too short for a prompt, before anything is generated.
    """
    maker = PromptMaker(tokenizer)
    for length in lengths:
        maker.prompt(length, 0.0, str(KEYS[-1]))
    for length, depth, trial in own_settings(lengths, depths, trials):
        prompt = maker.prompt(length, depth, draw_key(seed, length, depth, trial))
        tokens = maker.answer_tokens(prompt.key)
        if sequence_group():
            draft = maker.tokens_of(f" {prompt.key}.")
            answer = continue_greedily(model, prompt.ids, tokens, draft, set(end_ids(model)))
        else:
            answer = generate_greedy(model, tokenizer, prompt.ids, tokens, offload_cache=offload_cache)
        answered = tokenizer.decode(answer, skip_special_tokens=True)
        right = is_right(answered, prompt.key)
        yield Trial(length, depth, trial, len(prompt.ids), prompt.needle_start, prompt.key, answered, right)


def own_settings(lengths: list[int], depths: list[float], trials: int) -> list[tuple[int, float, int]]:
    """(length, depth, trial) of the prompts that this process answers, in order."""
    return own_share([(length, depth, trial) for length in lengths for depth in depths for trial in range(trials)])


def accuracy(trials: list[Trial], depths: list[float], lengths: list[int]) -> list[list[float]]:
    """Share of correct answers: a row per depth, a column per length."""
    cells: dict[tuple[float, int], list[bool]] = {}
    for trial in trials:
        cells.setdefault((trial.depth, trial.length), []).append(trial.is_right)
    return [[fmean(cells[depth, length]) for length in lengths] for depth in depths]
