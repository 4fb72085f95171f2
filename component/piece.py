"""How many tokens has a text, and where is one that is too long cut?

Tokens are counted as training counts them (dataset.encode_text): with what the tokenizer puts around a text, and an
end-of-sequence token. Long texts are cut where a paragraph ends, else where a line does, else at a space.
"""

import json
import math
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

UNIT_CHARACTERS = 2000  # at most, of a part of a long line: where there is no better place, cuts fall between parts
MARGIN = 1.02  # counts of parts add up to a little more or less than the whole's
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer reaches on running text
PARAGRAPH, LINE, INSIDE = 2, 1, 0  # what ends with a unit


def count_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each text as a training sample, its end-of-sequence token included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        encoded = [tokenizer(text).input_ids for text in texts]
    else:
        # straight to the library: without offsets it is half as fast again
        backend.no_truncation()
        backend.no_padding()
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts)]
    return [len(ids) + (not ids or ids[-1] != tokenizer.eos_token_id) for ids in encoded]


def is_surely_longer(text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `text` is longer by far than `tokens`, told from its beginning; False is no answer."""
    end = CHARACTERS_PER_TOKEN * tokens
    return len(text) > 2 * end and count_tokens([text[:end]], tokenizer)[0] > MARGIN * tokens + 64


def has_at_most_byte_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text has no more tokens than UTF-8 bytes (and a few around it): BPE that falls back to bytes.

    A normaliser could make a text longer first; Llama's, a mark for each space and one at the start, does not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    told = json.loads(backend.to_str())
    steps = [told["normalizer"]] if told["normalizer"] else []
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["normalizers"]
    is_known = all(
        step["type"] == "Prepend" or (step["type"] == "Replace" and step["pattern"] == {"String": " "})
        for step in steps
    )
    model, before = told["model"], json.dumps(told["pre_tokenizer"])
    return is_known and model["type"] == "BPE" and (bool(model.get("byte_fallback")) or '"ByteLevel"' in before)


def cut_text(text: str, least: int, most: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """(first, end) characters of pieces of about equal size, as few as `most` tokens allow; together all of `text`.

    The pieces' tokens are estimated from their parts: count them before use.
    """
    units = _units(text, min(UNIT_CHARACTERS, max(8, most // 4)))
    counts = count_tokens([text[first:end] for first, end, _ in units], tokenizer)
    around = count_tokens([""], tokenizer)[0]
    upto = [0, *accumulate(count - around for count in counts)]  # tokens before each unit
    room = max(least, int((most - around) / MARGIN))
    pieces, start = [], 0
    while start < len(units):
        rest = upto[-1] - upto[start]
        parts = math.ceil(rest / room)
        end = len(units) if parts <= 1 else _cut(units, upto, start, rest / parts, least, room)
        pieces.append((units[start][0], units[end - 1][1]))
        start = end
    return [_without_line_ends(text, *piece) for piece in pieces]


def _cut(units: list, upto: list[int], start: int, target: float, least: int, room: int) -> int:
    """The unit to cut before: near `target` tokens behind `start`, at the best kind of end there."""
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
    """(first character, end, what ends there): lines, and those of more than `longest` characters in parts."""
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
    """A piece's bounds without line ends at either side; its indentation stays."""
    while end > start and text[end - 1] in "\r\n":
        end -= 1
    while start < end and text[start] in "\r\n":
        start += 1
    return start, end
