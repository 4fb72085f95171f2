"""How is an instruction mixture selected? Deduplicated examples that fit, in the configured shares, shuffled.

Two passes as in component/corpus/pretrain.py: measure all examples, choose from the measurements, write the choice.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from component.corpus.mapping import Chat, mapping_of
from component.corpus.mixture import Mixture, MixtureSource, apportion
from component.corpus.sampling import first_of_each, lowest, sample_key, text_hash
from component.corpus.scan import Chunk, Place, Scan, ScannedChunk
from component.corpus.shuffle import write_shuffled
from component.corpus.token_count import TokenCounter
from component.data.chat_template import as_messages, encode_conversation
from component.data.reader import BadRecord
from component.data.record import text_problem


@dataclass
class Example(Place):
    """A chosen example."""

    tokens: int
    hashed: str
    key: int  # sort key of the shuffled order


class ExampleMeasure:
    """Measures chunks of a mixture's records: a row per candidate example."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mixture: Mixture, max_tokens: int, template: str):
        self.tokenizer, self.sources, self.max_tokens = tokenizer, mixture.sources, max_tokens
        self.template = template
        self.count = TokenCounter(tokenizer)

    def __call__(self, group: int, chunk: Chunk) -> ScannedChunk:
        measured, source = ScannedChunk(), self.sources[group]
        for number, record in chunk:
            try:
                chat = chat_of(record, source)
            except ValueError as error:
                measured.bad.append((number, str(error)))
                continue
            reason, tokens = self._examine(chat, source.filters)
            if reason:
                measured.noted[reason] += 1
            else:
                measured.rows.append((number, 0, 0, tokens, text_hash(*texts_of(chat))))
        return measured

    def _examine(self, chat: Chat, filters: dict) -> tuple[str, int]:
        """(why it is excluded, or the empty string; tokens in the training format)."""
        turns, system = chat
        if not turns or not all(question.strip() and answer.strip() for question, answer in turns):
            return "empty", 0
        text = "\n".join(texts_of(chat))
        if "contains" in filters and not re.search(filters["contains"], text):
            return "filtered", 0
        if "excludes" in filters and re.search(filters["excludes"], text):
            return "filtered", 0
        most = min(self.max_tokens, filters.get("max_tokens", self.max_tokens))
        if self.count.is_surely_longer(text, most):
            return "too_long", 0
        tokens = len(encode_conversation(self.tokenizer, list(turns), system, self.template)[0])
        if tokens < filters.get("min_tokens", 0):
            return "too_short", tokens
        return ("too_long" if tokens > most else ""), tokens


def chat_of(record: dict | BadRecord, source: MixtureSource) -> Chat:
    """
    Raises:
        ValueError: the record is bad, does not match its mapping, or has a system prompt that the output can't hold.
    """
    if isinstance(record, BadRecord):
        raise ValueError(record.problem)
    try:
        turns, system = mapping_of(source.mapping)(record)
    except (KeyError, TypeError, IndexError, AttributeError) as error:  # a nested field of another shape
        raise ValueError(f"does not match mapping {source.mapping} ({type(error).__name__}: {error})") from error
    if source.turns == "first" and system is not None:
        raise ValueError(
            f"its system prompt, {system[:40]!r}, has no field in input and output lines; keep it with turns: all"
        )
    for text in texts_of((turns, system)):
        if problem := text_problem(text):
            raise ValueError(f"one of its texts {problem}")
    return (turns if source.turns == "all" else turns[:1]), system


def texts_of(chat: Chat) -> list[str]:
    """All texts in order, the system prompt first if there is one."""
    turns, system = chat
    return [*([] if system is None else [system]), *(text for turn in turns for text in turn)]


def line_of(chat: Chat, source: MixtureSource) -> str:
    turns, system = chat
    if source.turns == "all":
        return json.dumps({"messages": as_messages(turns, system)}, ensure_ascii=False) + "\n"
    ((question, answer),) = turns
    return json.dumps({"input": question, "output": answer}, ensure_ascii=False) + "\n"


def choose_examples(scan: Scan, mixture: Mixture, seed: int) -> tuple[list[Example], list[dict]]:
    """The chosen examples in input order, and for each source how many were available and chosen."""
    kept = sum(count.kept for count in scan.counts)
    is_first = first_of_each((row[-1] for _, row in scan.rows()), kept)  # duplicates count for the first source
    available = [0] * len(mixture.sources)
    for (file, _), first in zip(scan.rows(), is_first, strict=True):
        available[scan.files[file].group] += bool(first)
    quotas = apportion(mixture.sources, mixture.total, available)
    chosen: list[Example] = []
    for group, quota in enumerate(quotas):
        keyed = (
            (sample_key(row[-1], seed), (file, row[0], row[3], row[4], sample_key(row[-1], seed, "order")))
            for (file, row), first in zip(scan.rows(), is_first, strict=True)
            if first and scan.files[file].group == group
        )
        chosen += [Example(*place) for place in lowest(keyed, quota).values()]
    counts = [{"available": has, "sampled": quota} for has, quota in zip(available, quotas, strict=True)]
    return sorted(chosen, key=lambda example: (example.file, example.number)), counts


def write_examples(file: Path, scan: Scan, mixture: Mixture, examples: list[Example]) -> None:
    """Write the examples shuffled.

    Raises:
        UserError: a file changed after it was scanned.
    """
    write_shuffled(file, _keyed_lines(scan, mixture, examples), len(examples))


def _keyed_lines(scan: Scan, mixture: Mixture, examples: list[Example]) -> Iterator[tuple[int, str]]:
    for example, record in scan.reread(examples):
        source = mixture.sources[scan.files[example.file].group]
        try:
            chat = chat_of(record, source)
        except ValueError as error:
            raise scan.changed(example) from error
        if text_hash(*texts_of(chat)) != example.hashed:
            raise scan.changed(example)
        yield example.key, line_of(chat, source)
