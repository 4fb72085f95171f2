"""Where is a text cut that is too long? At literal places; and nothing is lost or too long in any text."""

import random

import pytest

from component.piece import cut_text
from component.token_count import TokenCounter
from tests.words import word_tokenizer

COUNT = TokenCounter(word_tokenizer())


def pieces(text: str, least: int, most: int) -> list[str]:
    return [text[start:end] for start, end in cut_text(text, least, most, COUNT)]


def test_at_the_end_of_a_paragraph():
    text = "a a a\nb b b\n\nc c c\nd d d\n\ne e e\na a a"
    assert pieces(text, 4, 11) == ["a a a\nb b b", "c c c\nd d d", "e e e\na a a"]


def test_at_the_end_of_a_line_where_no_paragraph_ends_near():
    text = "a a a\nb b b\nc c c\nd d d\ne e e\na a a\n"
    assert pieces(text, 4, 11) == ["a a a\nb b b", "c c c\nd d d", "e e e\na a a"]


def test_at_a_space_where_no_line_ends():
    assert pieces("a b c d e a b c d e a b", 4, 13) == ["a b c d e a b", " c d e a b"]


def test_pieces_are_of_about_equal_size():
    text = "\n".join("a b c" for _ in range(21))  # 63 words, at most 32 in a piece: not 30, 30 and a rest of 3
    assert [piece.count("\n") + 1 for piece in pieces(text, 4, 34)] == [7, 7, 7]


def test_indentation_stays():
    assert pieces("  a a a\n\n  b b b\n\n  c c c\n\n  d d d", 4, 8) == ["  a a a", "  b b b", "  c c c", "  d d d"]


def random_text(seed: int) -> str:
    drawn = random.Random(seed)
    return "".join(drawn.choice("abcde") + drawn.choice("    \n\n") * drawn.choice((1, 1, 2)) for _ in range(400))


@pytest.mark.parametrize("seed", range(25))
def test_nothing_is_lost_and_nothing_too_long(seed):
    text = random_text(seed)
    found = pieces(text, 10, 60)
    assert "".join("".join(found).split()) == "".join(text.split())
    counts = COUNT(found)
    assert len(found) >= 7
    assert all(10 <= count <= 60 for count in counts), counts
