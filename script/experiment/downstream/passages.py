"""Which passages does a model continue? Random ones of a given length, with their true continuation."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from component.data.source import RecordTally, read_records
from component.error import UserError

SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019]?(?=\s)")
MAX_TRIES = 10_000
Passage = dict[str, Any]


def passages(
    source: Path, tokenizer: PreTrainedTokenizerBase, limits: tuple[int, int], new_tokens: int, seed: str
) -> Iterator[Passage]:
    """Endless random passages: a prompt from the start of a line to the end of a sentence, and its continuation.

    Args:
        source: file of {"text"} records, optionally with an "id".
        limits: minimum and maximum tokens of a prompt.
        new_tokens: tokens of the true continuation.

    Raises:
        UserError: no text is long enough, or none has suitable lines and sentences.
    """
    draw, tally = random.Random(seed), RecordTally()
    records = [record for _, record in tally.good(source, read_records(source, ("text",)))]
    tally.refuse_if_too_many()
    fewest, most = limits
    places = [offsets_of(tokenizer, record["text"]) for record in records]
    usable = [number for number, offsets in enumerate(places) if len(offsets) > 2 * (most + new_tokens)]
    if not usable:
        raise UserError(f"--source: {source} has no text twice as long as {most} tokens; use longer texts")
    for _ in range(MAX_TRIES):
        number = draw.choice(usable)
        text, offsets = records[number]["text"], places[number]
        last = draw.randrange(most, len(offsets) - new_tokens)
        sentence = SENTENCE_END.search(text, offsets[last][0])
        start = text.find("\n", offsets[last - draw.randint(fewest, most)][0]) + 1
        if not sentence or not 0 < start < sentence.end():
            continue
        prompt, rest = text[start : sentence.end()], text[sentence.end() :]
        tokens, ends = len(tokenizer(prompt).input_ids), offsets_of(tokenizer, rest[: 20 * new_tokens])
        if fewest <= tokens <= most and len(ends) >= new_tokens:
            name = str(records[number].get("id", f"text {number + 1}"))
            yield {"source": name, "tokens": tokens, "prompt": prompt, "true": rest[: ends[new_tokens - 1][1]]}
    raise UserError(f"--source: {source} has too few sentences that end {fewest} to {most} tokens after a line start")


def offsets_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Character offsets [start, end) of each token."""
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
