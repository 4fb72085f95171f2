"""What does a document become? One sample, cut, split into several, or left out."""

import pytest

from component.data.dataset import load_samples
from component.data.document import SampleOptions
from component.data.sample import CUT, fit
from component.error import UserError
from tests.chat_words import BOS, EOS, MANY, PROMPT, A, B, C, D, E, X, outcomes, rows, texts, word_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")
POLICY_CASES = {
    # text, max_seq_length: ids and labels under truncate, split, drop
    "with room": ("a b", 8, [[BOS, A, B, EOS]], [[BOS, A, B, EOS]], [[BOS, A, B, EOS]]),
    "just fitting": ("a b", 4, [[BOS, A, B, EOS]], [[BOS, A, B, EOS]], [[BOS, A, B, EOS]]),
    "but for its end": ("a b c", 4, [[BOS, A, B, C]], [[BOS, A, B, C]], [[BOS, A, B, C]]),
    "one token longer": ("a b c d", 4, [[BOS, A, B, C]], [[BOS, A, B, C], [BOS, D, EOS]], []),
    "two tokens longer": ("a b c d e", 4, [[BOS, A, B, C]], [[BOS, A, B, C], [BOS, D, E, EOS]], []),
    "its end alone left": ("a b c d e a", 4, [[BOS, A, B, C]], [[BOS, A, B, C], [BOS, D, E, A]], []),
    "many pieces": (
        "a b c d e a b",
        3,
        [[BOS, A, B]],
        [[BOS, A, B], [BOS, C, D], [BOS, E, A], [BOS, B, EOS]],
        [],
    ),
    "pieces of one token": ("a b c", 2, [[BOS, A]], [[BOS, A], [BOS, B], [BOS, C]], []),
}


@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
@pytest.mark.parametrize("name", POLICY_CASES)
def test_a_long_text(name, policy, write, words):
    text, longest, *expected = POLICY_CASES[name]
    samples, _ = load_samples(
        write(*texts(text, "e")), words, max(longest, 2), sft=False, truncation_policy=policy, max_bad_fraction=0
    )
    expected = expected[["truncate", "split", "drop"].index(policy)]
    tail = [[BOS, E, EOS][:longest]]
    assert rows(samples) == [(ids, [X, *ids[1:]]) for ids in expected + tail]


ENDS = {  # documents of a token file; in a text, </s> would be text
    "inside": ([BOS, A, EOS, B, C, EOS], [[BOS, A, EOS, B]], [[BOS, A, EOS, B], [BOS, C, EOS]], [[]]),
    "at the cut": ([BOS, A, B, EOS, C, EOS], [[BOS, A, B, EOS]], [[BOS, A, B, EOS], [BOS, C, EOS]], [[]]),
    "of its own": ([BOS, A, B, EOS], *[[[BOS, A, B, EOS]]] * 3),
}


@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
@pytest.mark.parametrize("name", ENDS)
def test_a_document_with_an_end_of_sequence(name, policy, words):
    ids, *expected = ENDS[name]
    options = SampleOptions(max_seq_length=4, sft=False, truncation_policy=policy)
    found = list(fit(ids, [X, *ids[1:]], options, words))
    expected = expected[["truncate", "split", "drop"].index(policy)]
    assert [sample["input_ids"] for sample in found] == expected
    assert [sample["labels"] for sample in found] == [[X, *ids[1:]] if ids else [] for ids in expected]


WITHOUT_BOS = {
    "with room": ("a b", 8, [[A, B, EOS]], [[A, B, EOS]], [[A, B, EOS]]),
    "just fitting": ("a b", 3, [[A, B, EOS]], [[A, B, EOS]], [[A, B, EOS]]),
    "but for its end": ("a b c", 3, [[A, B, C]], [[A, B, C]], [[A, B, C]]),
    "one token longer": ("a b c d", 3, [[A, B, C]], [[A, B, C], [D, EOS]], []),
    "its end alone left": ("a b c d e a", 3, [[A, B, C]], [[A, B, C], [D, E, A]], []),
}


@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
@pytest.mark.parametrize("name", WITHOUT_BOS)
def test_a_long_text_without_a_beginning_token(name, policy, write):
    """No token stands before a piece then, and its first token is nobody's label."""
    text, longest, *expected = WITHOUT_BOS[name]
    file = write(*texts(text, "e d"))
    samples, _ = load_samples(file, word_tokenizer("$A"), longest, sft=False, truncation_policy=policy)
    expected = expected[["truncate", "split", "drop"].index(policy)] + [[E, D, EOS]]
    assert rows(samples) == [(ids, [X, *ids[1:]]) for ids in expected]


@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
def test_a_tokenizer_that_ends_texts_itself(policy, write):
    """Its end is the text's, wherever the tokenizer was told to stop."""
    file = write(*texts("a b c d e", "a b", "c d e"))
    samples, _ = load_samples(file, word_tokenizer("<s> $A </s>"), 4, sft=False, truncation_policy=policy)
    short = [[BOS, A, B, EOS], [BOS, C, D, E]]
    first = {"truncate": [[BOS, A, B, C]], "split": [[BOS, A, B, C], [BOS, D, E, EOS]], "drop": []}[policy]
    assert [ids for ids, _ in rows(samples)] == first + short


@pytest.mark.parametrize(
    ("policy", "counts", "samples", "tokens", "notes"),
    [
        ("truncate", outcomes(whole=1, cut=4, empty=1), 5, 19, "4 truncated to max_seq_length; "),
        ("split", outcomes(whole=2, split=3, piece=4, empty=1), 9, 33, "3 of 6 lines split into 7 samples; "),
        ("drop", outcomes(whole=2, long=3, empty=1), 2, 7, "3 of 6 lines dropped: longer than max_seq_length; "),
    ],
)
def test_counts_and_what_is_said_of_them(policy, counts, samples, tokens, notes, write, words):
    file = write(*MANY)
    found, report = load_samples(file, words, 4, sft=False, truncation_policy=policy)
    assert (report.lines, report.samples, report.tokens, report.outcomes) == (6, samples, tokens, counts)
    assert (len(found), sum(len(ids) for ids, _ in rows(found))) == (samples, tokens)
    dropped = "1 of 6 lines dropped: no label tokens left"
    assert str(report) == f"{samples} samples, {tokens} tokens from {file} ({notes}{dropped})"


def test_packed_samples_are_those_of_the_set(write, words):
    """The pieces of a text too; the dropped ones in no row."""
    file = write(*MANY)
    samples, _ = load_samples(file, words, 4, sft=False, truncation_policy="split")
    packed, report = load_samples(file, words, 4, sft=False, truncation_policy="split", packing=True)
    assert [packed[at] for at in range(len(packed))] == [
        {"input_ids": ids, "labels": labels, "position_ids": list(range(len(ids)))}
        for ids, labels in sorted(rows(samples), key=lambda row: -len(row[0]))
    ]
    assert str(report).endswith("; packed into 9 rows, 91.7% full)")


def test_an_answer_that_is_too_long_is_cut_or_left_out(write, words):
    """... and so is one that has no room at all; but an end alone that has none leaves the answer whole."""
    lines = [{"input": "a b", "output": answer} for answer in ("c", "c d", "c d e", "")]
    long = {"input": "a b c d", "output": "e"}  # its question fills the sample
    file = write(*lines, long)
    cut, report = load_samples(file, words, len(PROMPT) + 2, sft=True)
    assert [[label for label in labels if label != X] for _, labels in rows(cut)] == [[C, EOS], [C, D], [C, D]]
    assert report.outcomes == outcomes(whole=1, cut=2, empty=2)
    dropped, report = load_samples(file, words, len(PROMPT) + 2, sft=True, truncation_policy="drop")
    assert [[label for label in labels if label != X] for _, labels in rows(dropped)] == [[C, EOS], [C, D]]
    assert report.outcomes == outcomes(whole=2, long=2, empty=1)


def test_everything_too_long(write, words):
    with pytest.raises(UserError, match="train_file: no label tokens in"):
        load_samples(write(*texts("a b c d")), words, 3, sft=False, truncation_policy="drop")


@pytest.mark.parametrize(
    ("max_seq_length", "ids", "cut"),
    [(6, [BOS, A, B, C, EOS], 0), (5, [BOS, A, B, C, EOS], 0), (3, [BOS, A, B], 1), (2, [BOS, A], 1)],
)
def test_what_is_longer_is_cut_at_the_end_and_counted(max_seq_length, ids, cut, write, words):
    samples, report = load_samples(write(*texts("a b c")), words, max_seq_length, sft=False)
    assert rows(samples) == [(ids, [-100, *ids[1:]])]
    assert report.cut == cut


def test_a_text_many_times_too_long(write, words):
    samples, report = load_samples(write(*texts("a b c d e " * 1000)), words, 4, sft=False)
    assert rows(samples) == [([BOS, A, B, C], [-100, A, B, C])]
    assert (report.cut, report.tokens) == (1, 4)


def test_an_end_of_sequence_at_the_cut_hides_no_cut(words):
    (sample,) = fit([BOS, A, B, EOS, D, EOS], [X, A, B, EOS, D, EOS], SampleOptions(4, sft=False), words)
    assert sample == {"input_ids": [BOS, A, B, EOS], "labels": [X, A, B, EOS], "outcome": CUT}


@pytest.mark.parametrize(
    ("room", "learnt", "cut"), [(4, [C, D, EOS], 0), (3, [C, D, EOS], 0), (2, [C, D], 1), (1, [C], 1)]
)
def test_answers_are_cut_at_the_end(room, learnt, cut, write, words):
    file = write({"input": "a b", "output": "c d"})
    samples, report = load_samples(file, words, len(PROMPT) + room, sft=True)
    ((ids, labels),) = rows(samples)
    assert labels == [-100] * len(PROMPT) + learnt
    assert len(ids) == len(labels)
    assert report.cut == cut


def test_answers_without_a_label_left_are_dropped_and_counted(write, words):
    long, short = {"input": "a b", "output": "c"}, {"input": "a", "output": "d"}
    file = write(long, short, {"input": "a", "output": "  "})
    samples, report = load_samples(file, words, len(PROMPT), sft=True)
    assert [labels for _, labels in rows(samples)] == [[-100] * (len(PROMPT) - 1) + [D]]
    assert (report.lines, report.samples, report.dropped, report.cut) == (3, 1, 2, 1)
