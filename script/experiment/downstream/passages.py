"""Which pieces of a book is a model asked to continue? Random ones, of a given length, and what truly follows."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from component.data.source import RecordTally, read_records
from component.error import UserError

SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019]?(?=\s)")
MOST_TRIES = 10_000
Passage = dict[str, Any]


def passages(
    source: Path, tokenizer: PreTrainedTokenizerBase, limits: tuple[int, int], new_tokens: int, seed: str
) -> Iterator[Passage]:
    """Random passages, as many as are asked for: whole lines up to the end of a sentence, and what follows.

    Args:
        source: a file of {"text"} records, with an "id" perhaps.
        limits: the fewest and the most tokens of a prompt.
        new_tokens: of what truly follows.

    Raises:
        UserError: no text is long enough, or none has lines and sentences.
    """
    draw, tally = random.Random(seed), RecordTally()
    records = [record for _, record in tally.good(source, read_records(source, ("text",)))]
    tally.refuse_if_too_many()
    fewest, most = limits
    places = [offsets_of(tokenizer, record["text"]) for record in records]
    usable = [number for number, offsets in enumerate(places) if len(offsets) > 2 * (most + new_tokens)]
    if not usable:
        raise UserError(f"--source: {source} has no text twice as long as {most} tokens; name one of longer texts")
    for _ in range(MOST_TRIES):
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
    raise UserError(f"--source: too few sentences end behind {fewest} to {most} tokens of whole lines in {source}")


def offsets_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """[start, end) of each token, in characters."""
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
