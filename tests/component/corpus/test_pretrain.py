"""What is a pretraining corpus? Texts whose counted tokens are in range; too long ones cut at literal places."""

import random

import pytest

from component.corpus.pretrain import TextMeasure, cut_text
from component.corpus.sampling import text_hash
from component.corpus.token_count import TokenCounter
from component.data.reader import BadRecord
from tests.conftest import TEXTS
from tests.words import word_tokenizer

TEXT = " ".join(TEXTS)  # with letters of two and three bytes
LEAST, MOST = 40, 90


def measured(tokenizer, texts: list, long_texts: str = "drop"):
    chunk = [(number, {"text": text}) for number, text in enumerate(texts, 1)]
    return TextMeasure(tokenizer, LEAST, MOST, long_texts, "text")(0, chunk)


def test_short_cuts_decide_as_counting_does(tokenizer):
    texts = [TEXT[start : start + length] for start in range(0, 400, 7) for length in (10, 30, 40, 60, 150, 200, 250)]
    texts += ["東" * length for length in range(5, 60)] + [TEXT * 50, TEXT * 5]
    counts = TokenCounter(tokenizer)(texts)
    kept = [
        (number, 0, len(text), count, text_hash(text))
        for number, (text, count) in enumerate(zip(texts, counts, strict=True), 1)
        if LEAST <= count <= MOST
    ]
    found = measured(tokenizer, texts)
    assert found.rows == kept
    assert found.noted == {"too_short": sum(n < LEAST for n in counts), "too_long": sum(n > MOST for n in counts)}
    assert min(found.noted.values()) > 20, "there are some of each"
    assert any(len(text) < LEAST - 4 for text in texts), "some are short enough for the short cut"
    assert any(end - start < LEAST for _, start, end, *_ in kept), "and some are not, having many bytes a letter"


def test_a_text_that_is_nearly_too_long_stays_whole():
    text = " ".join(["abcdef"] * 38)  # 40 tokens; its characters make it look longer
    found = TextMeasure(word_tokenizer(), 30, 40, "split", "text")(0, [(1, {"text": text})])
    assert (found.rows, found.noted) == ([(1, 0, len(text), 40, text_hash(text))], {"split": 0})


def test_a_piece_of_nothing_but_blanks_is_no_text():
    text = "a b c d e\n" + " " * 4000 + "\na b c d e"
    found = TextMeasure(word_tokenizer(), 1, 9, "split", "text")(0, [(1, {"text": text})])
    assert all(text[start:end].strip() for _, start, end, *_ in found.rows)
    assert sum(tokens - 2 for _, _, _, tokens, _ in found.rows) == 10, "every word is there"


def test_bad_records_are_passed_on(tokenizer):
    chunk = [(1, {"text": " \n"}), (2, BadRecord("not JSON"))]
    found = TextMeasure(tokenizer, LEAST, MOST, "drop", "text")(0, chunk)
    assert (found.rows, found.noted, found.bad) == ([], {"too_short": 1}, [(2, "not JSON")])


def test_pieces_are_of_their_texts_and_counted_apart(tokenizer):
    text = "\n".join(TEXTS * 3)
    found = measured(tokenizer, [text, TEXTS[0]], "split")
    assert found.noted["split"] == 1
    assert len(found.rows) >= 5
    for number, start, end, tokens, hashed in found.rows:
        assert (number, hashed) == (1, text_hash(text[start:end]))
        assert TokenCounter(tokenizer)([text[start:end]]) == [tokens]
        assert LEAST <= tokens <= MOST


# --- where a text is cut that is too long ---

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
