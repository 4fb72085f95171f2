"""Of which words and sentences are RULER's texts made?"""

import random
from itertools import islice

import pytest

from component.error import UserError
from component.evaluate.ruler_words import (
    ADJECTIVES,
    LISTED,
    NOUNS,
    PARTS,
    WORDS,
    draw_key,
    draw_words,
    generated_text,
    read_text,
    sentences,
)
from tests.words import write_lines


def test_the_lists_have_words_of_one_length_each_once():
    assert {len(word) for word in LISTED} == {5}
    assert {len(word) for word in PARTS} == {4}
    for words in (LISTED, PARTS, ADJECTIVES, NOUNS):
        assert len(words) == len(set(words))
        assert all(word.isascii() and word.isalpha() and word.islower() for word in words)


@pytest.mark.parametrize("count", [10, 916, 917, 1400])
def test_no_word_contains_another(count):
    """Every pair is compared."""
    words = draw_words(random.Random(3), count)
    assert len(set(words)) == count
    assert not [(one, other) for one in words for other in words if one != other and one in other]


def test_beyond_the_list_words_of_two_parts_are_mixed_in():
    assert {len(word) for word in draw_words(random.Random(0), len(LISTED))} == {5}
    words = draw_words(random.Random(0), 2 * len(LISTED))
    share = [sum(len(word) == 5 for word in half) / len(half) for half in (words[:900], words[900:])]
    assert all(0.4 < one < 0.6 for one in share), share


def test_a_longer_draw_begins_with_the_shorter_one():
    assert draw_words(random.Random(5), 300)[:299] == draw_words(random.Random(5), 299)
    assert draw_words(random.Random(5), 40) != draw_words(random.Random(6), 40)


def test_there_is_a_largest_number_of_words():
    assert len(draw_words(random.Random(0), 10**6)) == WORDS


def test_keys():
    adjective, noun = draw_key(random.Random(0)).split("-")
    assert adjective in ADJECTIVES
    assert noun in NOUNS


def test_generated_sentences_are_the_same_every_time_and_do_not_repeat():
    assert generated_text(5000) == generated_text(6000)[:5000]
    found = list(islice(sentences(), 500))
    assert len(set(found)) == 500
    assert all(one.startswith("The ") and one.endswith(".") for one in found)
    assert " ".join(found).split()[:1000] == generated_text(1000)


class TestUsersText:
    def test_words_of_all_records_in_order_and_repeated_if_too_few(self, tmp_path):
        file = write_lines(tmp_path / "b.jsonl", {"text": "One two.\nThree"}, {"text": "four  five.", "id": 1})
        assert read_text(str(file), 4) == ["One", "two.", "Three", "four"]
        assert read_text(str(file), 7) == ["One", "two.", "Three", "four", "five.", "One", "two."]

    @pytest.mark.parametrize(
        ("record", "part"),
        [({"content": "a"}, 'no "text"'), ({"text": 3}, '"text"'), ([1], "not an object")],
    )
    def test_bad_records_are_refused_by_name_and_line(self, record, part, tmp_path):
        file = write_lines(tmp_path / "b.jsonl", {"text": "a b"}, record)
        with pytest.raises(UserError, match=r"--haystack: .*b\.jsonl:2: ") as refused:
            read_text(str(file), 100)
        assert part in str(refused.value)

    def test_no_such_file_and_no_text(self, tmp_path):
        with pytest.raises(UserError, match="--haystack: there is no file"):
            read_text(str(tmp_path / "none.jsonl"), 5)
        (tmp_path / "empty.jsonl").write_text("")
        with pytest.raises(UserError, match=r"--haystack: .*empty\.jsonl holds no text"):
            read_text(str(tmp_path / "empty.jsonl"), 5)

    def test_texts_without_spaces(self, tmp_path):
        file = write_lines(tmp_path / "b.jsonl", {"text": "\u5b57" * 500}, {"text": "a b c"})
        with pytest.raises(UserError, match=r"--haystack: the words of .* have 126 characters on average"):
            read_text(str(file), 100)
