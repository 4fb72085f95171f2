"""Texts become documents of ids: in the order of the input, without special tokens, by any number of processes."""

import pytest

from component.corpus.tokenize import documents
from component.data.source import RecordTally
from component.error import UserError
from tests.words import word_tokenizer, write_lines

UNKNOWN, A, B, C = 2, 3, 4, 5


@pytest.fixture
def paths(tmp_path):
    first = write_lines(tmp_path / "1.jsonl", {"text": "a b"}, {"text": "  "}, {"text": "c"}, {"txt": "a"})
    return [first, write_lines(tmp_path / "2.jsonl", {"text": "b b a"}, {"text": "a </s>"})]


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("characters", [1, 4, 2**19])
def test_ids_by_hand(num_proc, characters, paths, monkeypatch):
    monkeypatch.setattr("component.corpus.tokenize.CHUNK_CHARACTERS", characters)
    tally = RecordTally()
    found = list(documents(paths, word_tokenizer(), tally, key="text", num_proc=num_proc))
    assert found == [[A, B], [C], [B, B, A], [A, UNKNOWN]], "</s> in a text is a word"
    assert (tally.total, tally.bad) == (6, 1)


@pytest.mark.parametrize(("most", "expected"), [(1, [[A, B]]), (3, [[A, B], [C], [B, B, A]])])
def test_the_first_documents_alone(most, expected, paths):
    tally = RecordTally()
    found = documents(paths, word_tokenizer(), tally, key="text", num_proc=1, max_documents=most)
    assert list(found) == expected


def test_too_many_bad_records_are_refused_at_the_end(paths):
    found, seen = documents(paths, word_tokenizer(), RecordTally(), key="text", num_proc=1, max_bad_fraction=0.1), []
    with pytest.raises(UserError, match=r"1\.jsonl:4: "):
        seen.extend(found)
    assert len(seen) == 4
