"""Where is a text cut that is too long? Where a paragraph ends, else where a line does, else at a space."""

import math
from itertools import accumulate

from component.token_count import MARGIN, TokenCounter

UNIT_CHARACTERS = 2000  # at most, of a part of a long line: where there is no better place, cuts fall between parts
PARAGRAPH, LINE, INSIDE = 2, 1, 0  # what ends with a unit


def cut_text(text: str, least: int, most: int, count: TokenCounter) -> list[tuple[int, int]]:
    """(first, end) characters of pieces of about equal size, as few as `most` tokens allow; together all of `text`.

    The pieces' tokens are estimated from their parts: count them before use.
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
