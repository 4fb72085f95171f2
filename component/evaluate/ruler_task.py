"""What does each of RULER's tasks ask? Synthetic tasks for long contexts (Hsieh et al., arXiv 2404.06654).

A text grows by units: noise lines, needles, words of a haystack, words of a list. The structure, the numbers of
needles, words and repetitions, and the room for the answer are the published ones; sentences and word lists are our
own. All that is drawn follows from one seed; a text of more units has the same needles.
"""

import math
import random
import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from component.evaluate.ruler_words import NOISE, WORDS, draw_key, draw_words


class Question(NamedTuple):
    text: str
    prefix: str  # with which the answer begins
    references: list[str]  # strings that the answer should contain


Build = Callable[[str, int, int, list[str]], Question]  # (seed, units, length in tokens, words of the haystack)


@dataclass(frozen=True)
class Task:
    build: Build
    answer_tokens: int  # generated, and kept free in the length
    least: int  # units
    most: int | None = None
    uses_haystack: bool = False


# ---- needles in a haystack

NEEDLE = "One of the secret {kind}s of {key} is: {value}."
ONE = "A secret {kind} is hidden in the following text. Remember it: a question at the end asks for it.\n"
SEVERAL = (
    "Some secret {kind}s are hidden in the following text. Remember them: the question at the end asks for them.\n"
)
ASK_ONE = "\nWhat is the secret {kind} of {query} in the text above?"
ASK_SEVERAL = "\nWhat are all the secret {kind}s of {query} in the text above?"
ONE_IS = "The secret {kind} of {query} in the text is"
SEVERAL_ARE = "The secret {kind}s of {query} in the text are"
ENDS, QUOTES = r"[.!?\u2026\u3002\uff01\uff1f]", r"[\"'\u201d\u2019\u00bb)\]]"
SENTENCE_END = re.compile(f"(?:(?<={ENDS})|(?<={ENDS}{QUOTES})) ")
LONGEST_SENTENCE = 100  # words, on average
DEPTHS = 40  # places of a text at which a needle may be: evenly spaced, start and end included


def needle_question(
    seed: str,
    units: int,
    length: int,
    haystack: list[str],
    *,
    kind: str,
    key: str = "word",
    value: str = "number",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Question:
    """Needles among noise lines, other needles, or words of a text.

    Args:
        kind: of the haystack: noise, needle, or text.
        key, value: what they are: word, number, or uuid.
        keys, values: different keys, and needles of each.
        queries: keys that are asked for.
    """
    draw = random.Random(f"{seed} needles")
    made = _different(lambda: _draw(key, draw), keys)
    hidden = {name: _different(lambda: _draw(value, draw), values) for name in made}
    needles = [NEEDLE.format(kind=value, key=name, value=one) for name in made for one in hidden[name]]
    draw.shuffle(needles)
    asked = draw.sample(made, queries)
    if kind == "text":
        context = _among_sentences(needles, haystack[:units], draw)
    else:
        lines = [NOISE] * units if kind == "noise" else _distractors(seed, units, key, value, set(made))
        context = "\n".join(_inserted(lines, needles, random.Random(f"{seed} places")))
    ask, prefix = (ASK_ONE, ONE_IS) if queries * values == 1 else (ASK_SEVERAL, SEVERAL_ARE)
    intro = ONE if queries * values == 1 else SEVERAL
    named = {"kind": value, "query": ", ".join(asked[:-1]) + ", and " * (queries > 1) + asked[-1]}
    text = intro.format(**named) + context + ask.format(**named)
    return Question(text, prefix.format(**named), [one for name in asked for one in hidden[name]])


def _draw(kind: str, draw: random.Random) -> str:
    if kind == "word":
        return draw_key(draw)
    if kind == "number":
        return str(draw.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _different(draw_one: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw_one()] = None
    return list(found)


def _distractors(seed: str, count: int, key: str, value: str, taken: set[str]) -> list[str]:
    """Needles of other keys than those of `taken`."""
    draw = random.Random(f"{seed} distractors")
    found: list[str] = []
    while len(found) < count:
        if (name := _draw(key, draw)) not in taken:
            found.append(NEEDLE.format(kind=value, key=name, value=_draw(value, draw)))
    return found


def _inserted(lines: list[str], more: list[str], draw: random.Random) -> list[str]:
    """`lines` with those of `more`, in order, each before another line."""
    places = dict(zip(sorted(draw.sample(range(len(lines)), len(more))), more, strict=True))
    return [text for at, line in enumerate(lines) for text in ([places[at], line] if at in places else [line])]


def _among_sentences(needles: list[str], words: list[str], draw: random.Random) -> str:
    """The words as text, with each needle between two sentences, or two words, at one of DEPTHS depths."""
    sentences = SENTENCE_END.split(" ".join(words))
    if len(words) > LONGEST_SENTENCE * len(sentences):  # code, logs, verse: nothing ends sentences
        sentences = words
    depths = sorted(draw.sample(range(DEPTHS), len(needles)))
    places = [0, *(len(sentences) * depth // (DEPTHS - 1) for depth in depths), len(sentences)]
    parts = []
    for at, (start, end) in enumerate(pairwise(places)):
        parts += [*sentences[start:end], *needles[at : at + 1]]
    return " ".join(parts)


# ---- variable tracking

CHAIN = "The following text hides a chain of assignments to variables. Follow it from its first value to its end.\n\n"
ASK_CHAIN = "\nQuestion: Which variables have the value {value} in the text above?"
CHAIN_PREFIX = "Answer: By the chain of assignments in the text above, {count} variables have the value {value}:"
HOPS = 4
EXAMPLE_LINES = 10  # noise lines of the example that goes before


def chain_question(seed: str, units: int, length: int, haystack: list[str]) -> Question:
    """One chain of HOPS assignments after the first, among noise lines, after a short solved example."""
    example = _chain(f"{seed} example", EXAMPLE_LINES, letters=3)
    asked = _chain(seed, units, letters=5)
    solved = f"{example.text} {example.prefix} {' '.join(example.references)}"
    return asked._replace(text=f"{solved}\n\n{asked.text}")


def _chain(seed: str, units: int, letters: int) -> Question:
    draw = random.Random(f"{seed} chain")
    names = _different(lambda: "".join(draw.choices(string.ascii_uppercase, k=letters)), HOPS + 1)
    value = draw.randint(10_000, 99_999)
    steps = [f"VAR {names[0]} = {value}"]
    steps += [f"VAR {name} = VAR {before}" for before, name in pairwise(names)]
    context = "\n".join(_inserted([NOISE] * units, steps, random.Random(f"{seed} places")))
    text = CHAIN + context + ASK_CHAIN.format(value=value)
    return Question(text, CHAIN_PREFIX.format(count=len(names), value=value), names)


# ---- words by frequency

COMMON = "In the numbered list below, some words occur more often than others. Remember those that occur most often.\n"
ASK_COMMON = "\nQuestion: Which 10 words occur most often in the list above?"
COMMON_PREFIX = "Answer: The 10 words that occur most often in the list are:"
COMMON_WORDS = 10
SHORT = 4096  # tokens; shorter lists repeat words less

CODED = "In the coded text below, some coded words occur more often than others. Find the three most frequent ones. "
ASK_CODED = (
    "\nQuestion: Which three words occur most often in the coded text above? Ignore '...', and explain nothing."
)
CODED_PREFIX = "Answer: The three words that occur most often in the coded text are:"
ALPHA = 2.0  # of the Zipf distribution
ZETA = math.pi**2 / 6  # Riemann's zeta function of ALPHA
LETTERS = 6  # of a coded word
TOKENS_PER_WORD = 50  # of the length, for each word of the vocabulary


def common_question(seed: str, units: int, length: int, haystack: list[str]) -> Question:
    """A list of `units` words, COMMON_WORDS of them common ones, after a short solved example."""
    is_short = length < SHORT
    example = _list(f"{seed} example", *((20, 3, 1) if is_short else (40, 10, 3)))
    asked = _list(seed, units, *((6, 1) if is_short else (30, 3)))
    solved = f"{example.text} {example.prefix} {numbered(example.references)}"
    return asked._replace(text=f"{solved}\n{asked.text}")


def _list(seed: str, words: int, common: int, uncommon: int) -> Question:
    """`common` and `uncommon`: how often a word of each kind occurs."""
    drawn = draw_words(random.Random(f"{seed} words"), words)
    most, rest = drawn[:COMMON_WORDS], drawn[COMMON_WORDS:]
    entries = most * common + rest * uncommon
    random.Random(f"{seed} order").shuffle(entries)
    return Question(COMMON + numbered(entries) + ASK_COMMON, COMMON_PREFIX, most)


def numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def frequent_question(seed: str, units: int, length: int, haystack: list[str]) -> Question:
    """Coded words of which the k-th occurs `units` / (zeta(2) k^2) times; the first is noise, the next three asked."""
    draw = random.Random(f"{seed} words")
    count = max(length // TOKENS_PER_WORD, 2 * COMMON_WORDS)
    words = ["...", *_different(lambda: "".join(draw.choices(string.ascii_lowercase, k=LETTERS)), count - 1)]
    text = [word for rank, word in enumerate(words, 1) for _ in range(int(units / (ZETA * rank**ALPHA)))]
    random.Random(f"{seed} order").shuffle(text)
    return Question(CODED + " ".join(text) + ASK_CODED, CODED_PREFIX, words[1:4])


_needle = partial(Task, answer_tokens=128, least=4)
_text = partial(Task, answer_tokens=128, least=4, uses_haystack=True)
TASKS = {
    "niah_single_1": _needle(partial(needle_question, kind="noise")),
    "niah_single_2": _text(partial(needle_question, kind="text")),
    "niah_single_3": _text(partial(needle_question, kind="text", value="uuid")),
    "niah_multikey_1": _text(partial(needle_question, kind="text", keys=4)),
    "niah_multikey_2": _needle(partial(needle_question, kind="needle")),
    "niah_multikey_3": _needle(partial(needle_question, kind="needle", key="uuid", value="uuid")),
    "niah_multivalue": _text(partial(needle_question, kind="text", values=4)),
    "niah_multiquery": _text(partial(needle_question, kind="text", keys=4, queries=4)),
    "vt": Task(chain_question, answer_tokens=30, least=HOPS + 1),
    "cwe": Task(common_question, answer_tokens=120, least=COMMON_WORDS + 1, most=WORDS),
    "fwe": Task(frequent_question, answer_tokens=50, least=100),  # from there on the first ranks differ in frequency
}
