"""How is a pretraining corpus selected? Deduplicated texts within a length range, a uniform sample in input order.

Texts that are too long may be split, at the end of a paragraph, else of a line, else at a space.

Two passes: the first counts the tokens of every text (component/corpus/scan.py), the sample is chosen from the counts
alone (component/corpus/sampling.py), and the second pass reads the files again and writes it. No text stays in memory.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from component.corpus.sampling import first_of_each, lowest, sample_key, text_hash
from component.corpus.scan import Chunk, Place, Scan, ScannedChunk
from component.corpus.token_count import MARGIN, TokenCounter
from component.data.reader import BadRecord

UNIT_CHARACTERS = 2000  # longest part of a line; without a better place, texts are split between parts
PARAGRAPH, LINE, INSIDE = 2, 1, 0  # what ends at a unit's end


@dataclass
class Choice(Place):
    """A chosen text, or piece of a text."""

    start: int  # characters
    end: int
    tokens: int
    hashed: str


class TextMeasure:
    """Measures chunks of {key: text}: a row per text, or piece of a text, of min_tokens to max_tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, min_tokens: int, max_tokens: int, long_texts: str, key: str
    ):
        self.count, self.key, self.is_split = TokenCounter(tokenizer), key, long_texts == "split"
        self.least, self.most = min_tokens, max_tokens
        # a text of fewer bytes has too few tokens: most texts of a crawl need no tokenization
        self.too_few_bytes = min_tokens - self.count.around - 1 if self.count.has_at_most_byte_tokens else 0

    def __call__(self, group: int, chunk: Chunk) -> ScannedChunk:
        measured = ScannedChunk()
        counted: list[tuple[int, str]] = []
        for number, record in chunk:
            if isinstance(record, BadRecord):
                measured.bad.append((number, record.problem))
                continue
            text = record[self.key]
            if not text.strip() or (len(text) < self.too_few_bytes and len(text.encode()) < self.too_few_bytes):
                measured.noted["too_short"] += 1
            elif not self.is_split and self.count.is_surely_longer(text, self.most):
                measured.noted["too_long"] += 1
            elif self.is_split and len(text) > 4 * self.most:  # likely too long: counted by pieces
                self._split(number, text, measured)
            else:
                counted.append((number, text))
        tokens = self.count([text for _, text in counted])
        for (number, text), count in zip(counted, tokens, strict=True):
            if count > self.most and self.is_split:
                self._split(number, text, measured)
            else:
                self._take(number, text, 0, len(text), count, measured)
        measured.rows.sort()
        return measured

    def _take(self, number: int, text: str, start: int, end: int, tokens: int, measured: ScannedChunk) -> None:
        piece = text[start:end]
        if tokens < self.least or not piece.strip():
            measured.noted["too_short"] += 1
        elif tokens > self.most:
            measured.noted["too_long"] += 1
        else:
            measured.rows.append((number, start, end, tokens, text_hash(piece)))

    def _split(self, number: int, text: str, measured: ScannedChunk) -> None:
        pieces = cut_text(text, self.least, self.most, self.count)
        measured.noted["split"] += len(pieces) > 1
        for start, end in pieces:  # one at a time: a book's tokens are never all in memory
            (tokens,) = self.count([text[start:end]])
            self._take(number, text, start, end, tokens, measured)


def cut_text(text: str, least: int, most: int, count: TokenCounter) -> list[tuple[int, int]]:
    """[start, end) characters of the fewest pieces of about equal size with at most `most` tokens each.

    Their tokens are estimated from their parts: count them before use.
    """
    units = _units(text, min(UNIT_CHARACTERS, max(8, most // 4)))
    counts = count([text[first:end] for first, end, _ in units])
    around = count.around
    upto = [0, *accumulate(tokens - around for tokens in counts)]  # tokens before each unit
    room = max(least, int((most - around) / MARGIN))
    if room < upto[-1] <= MARGIN * most and count([text])[0] <= most:  # estimated too long, but is not
        return [(0, len(text))]
    pieces, start = [], 0
    while start < len(units):
        rest = upto[-1] - upto[start]
        parts = math.ceil(rest / room)
        end = len(units) if parts <= 1 else _cut(units, upto, start, rest / parts, least, room)
        pieces.append((units[start][0], units[end - 1][1]))
        start = end
    return [_without_line_ends(text, *piece) for piece in pieces]


def _cut(units: list, upto: list[int], start: int, target: float, least: int, room: int) -> int:
    """The unit to split before: near `target` tokens after `start`, at the best kind of end there."""
    best, best_rank = start + 1, (-1, 0.0)
    for end in range(start + 1, len(units)):
        tokens = upto[end] - upto[start]
        if tokens > room:
            break
        is_near = max(least, 0.8 * target) <= tokens
        rank = (units[end - 1][2] if is_near else -1, -abs(tokens - target))
        if end == start + 1 or rank > best_rank:
            best, best_rank = end, rank
    return best


def _units(text: str, longest: int) -> list[tuple[int, int, int]]:
    """(start, end, what ends there) of lines, and of the parts of lines longer than `longest` characters."""
    units, start = [], 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        while end - start > longest:
            space = text.rfind(" ", start + 1, start + longest)
            cut = space if space > 0 else start + longest
            units.append((start, cut, INSIDE))
            start = cut
        units.append((start, end, PARAGRAPH if text[end : end + 1] in ("\n", "\r") else LINE))
        start = end
    return units


def _without_line_ends(text: str, start: int, end: int) -> tuple[int, int]:
    """The bounds without line breaks at either end; indentation stays."""
    while end > start and text[end - 1] in "\r\n":
        end -= 1
    while start < end and text[start] in "\r\n":
        start += 1
    return start, end


def sample_texts(scan: Scan, num_samples: int, seed: int) -> tuple[list[Choice], Counter]:
    """The sample in input order, and the number of duplicates in each file."""
    kept = sum(count.kept for count in scan.counts)
    is_first = first_of_each((row[-1] for _, row in scan.rows()), kept)
    duplicates = Counter(file for (file, _), first in zip(scan.rows(), is_first, strict=True) if not first)
    keyed = ((sample_key(row[-1], seed), (file, *row)) for file, row in scan.rows())  # equal texts, equal keys
    return [Choice(*place) for place in sorted(lowest(keyed, num_samples).values())], duplicates


def write_corpus(file: Path, scan: Scan, choices: list[Choice], key: str) -> None:
    """Write one {"text": ...} per line.

    Raises:
        UserError: a file changed after it was scanned.
    """
    with file.open("w", encoding="utf-8", newline="\n") as lines:
        for text in tqdm(texts_of(scan, choices, [key]), total=len(choices), desc="writing", unit=" texts"):
            lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def texts_of(scan: Scan, choices: list[Choice], keys: list[str]) -> Iterator[str]:
    """The chosen texts, given in input order; `keys`: of the text in the records of each source.

    Raises:
        UserError: a file changed after it was scanned.
    """
    for choice, record in scan.reread(choices):
        key = keys[scan.files[choice.file].group]
        text = record[key][choice.start : choice.end] if isinstance(record, dict) else ""
        if text_hash(text) != choice.hashed:
            raise scan.changed(choice)
        yield text
