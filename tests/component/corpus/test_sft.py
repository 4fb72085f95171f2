"""What is an instruction corpus? Which examples are in range, and how they are written."""

import json

import pytest

from component.corpus.mixture import Mixture, MixtureSource
from component.corpus.sampling import text_hash
from component.corpus.sft import ExampleMeasure, chat_of, line_of
from component.data.chat_template import encode_chat
from component.data.reader import BadRecord
from tests.words import word_tokenizer

FRAME = len(encode_chat(word_tokenizer(), [("", "")])[0])  # tokens of a chat without texts, in words
TWO = {
    "conversations": [{"from": side, "value": text} for side, text in zip(("human", "gpt") * 2, "abcd", strict=True)]
}


def source(**changes) -> MixtureSource:
    return MixtureSource(**{"name": "s", "path": "p", "mapping": "input_output", **changes})


def pair(question: str, answer: str) -> dict:
    return {"input": question, "output": answer}


def measured(records: list, most: int = FRAME + 4, **changes):
    mixture = Mixture([source(**changes)])
    return ExampleMeasure(word_tokenizer(), mixture, most, "vicuna")(0, list(enumerate(records, 1)))


def test_rows_hold_the_tokens_of_training():
    found = measured([pair("a", "b"), pair("a b", "c d"), BadRecord("not JSON"), {"input": "a"}])
    assert [(number, tokens) for number, _, _, tokens, _ in found.rows] == [(1, FRAME + 2), (2, FRAME + 4)]
    assert found.rows[0][-1] == text_hash("a", "b") != text_hash("b", "a")
    assert [number for number, _ in found.bad] == [3, 4]
    assert found.bad[0][1] == "not JSON"


@pytest.mark.parametrize(
    ("record", "filters", "reason"),
    [
        (pair(" ", "b"), {}, "empty"),
        (pair("a", "\n"), {}, "empty"),
        (pair("a a a", "b b"), {}, "too_long"),
        (pair("a", "b"), {"max_tokens": FRAME + 1}, "too_long"),
        (pair("a", "b"), {"min_tokens": FRAME + 3}, "too_short"),
        (pair("a", "b"), {"contains": "c"}, "filtered"),
        (pair("a", "b"), {"excludes": "b"}, "filtered"),
        (pair("a", "b"), {"contains": "a\nb", "excludes": "c", "min_tokens": FRAME + 2}, None),
    ],
)
def test_what_is_left_out(record, filters, reason):
    found = measured([record], filters=filters)
    assert (dict(found.noted), len(found.rows)) == (({reason: 1}, 0) if reason else ({}, 1))


@pytest.mark.parametrize(("turns", "expected"), [("first", [("a", "b")]), ("all", [("a", "b"), ("c", "d")])])
def test_turns_of_a_conversation(turns, expected):
    assert chat_of(TWO, source(mapping="conversations", turns=turns)) == (expected, None)


def test_a_record_of_another_shape():
    record = {"question_text": "Who?", "document_text": "He .", "annotations": [{"long_answer": {"start_token": 0}}]}
    with pytest.raises(ValueError, match=r"^does not match mapping natural_questions \(KeyError: 'end_token'\)"):
        chat_of(record, source(mapping="natural_questions"))
    with pytest.raises(ValueError, match='"input" holds half a character'):
        chat_of(pair("\ud83d", "b"), source())


def test_lines():
    assert line_of(([("a", "«b»")], None), source()) == '{"input": "a", "output": "«b»"}\n'
    line = line_of(([("a", "b"), ("c", "d")], None), source(turns="all"))
    roles = ["user", "assistant"] * 2
    said = [{"role": role, "content": text} for role, text in zip(roles, "abcd", strict=True)]
    assert json.loads(line) == {"messages": said}
