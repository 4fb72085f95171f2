"""What is a pretraining corpus? Texts whose counted tokens are in range, by short cuts or not."""

from component.corpus import TextMeasure
from component.selection import text_hash
from component.token_count import TokenCounter
from component.unpack import BadRecord
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
