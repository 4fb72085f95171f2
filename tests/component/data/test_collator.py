"""How do samples become a batch? Whole tensors, written out."""

import pytest
import torch
from torch import tensor

from component.data.collator import RightPadCollator
from component.data.skipping import row_key

LONG = {"input_ids": [1, 5, 6, 7], "labels": [-100, 5, 6, 7]}
SHORT = {"input_ids": [1, 8], "labels": [-100, 8]}


def assert_batch(batch, **expected):
    assert set(batch) == set(expected)
    for name, rows in expected.items():
        assert batch[name].dtype == torch.int64
        assert torch.equal(batch[name], tensor(rows)), name


def test_padding_stands_on_the_right_and_is_masked():
    assert_batch(
        RightPadCollator(9)([SHORT, LONG]),
        input_ids=[[1, 8, 9, 9], [1, 5, 6, 7]],
        attention_mask=[[1, 1, 0, 0], [1, 1, 1, 1]],
        position_ids=[[0, 1, 2, 3], [0, 1, 2, 3]],
        labels=[[-100, 8, -100, -100], [-100, 5, 6, 7]],
        shift_labels=[[8, -100, -100, -100], [5, 6, 7, -100]],
    )


def test_a_genuine_end_is_trained_on_where_pads_have_its_id():
    eos = 2
    ended = {"input_ids": [1, 5, eos], "labels": [-100, 5, eos]}
    assert_batch(
        RightPadCollator(eos)([ended, LONG]),
        input_ids=[[1, 5, eos, eos], [1, 5, 6, 7]],
        attention_mask=[[1, 1, 1, 0], [1, 1, 1, 1]],
        position_ids=[[0, 1, 2, 3], [0, 1, 2, 3]],
        labels=[[-100, 5, eos, -100], [-100, 5, 6, 7]],
        shift_labels=[[5, eos, -100, -100], [5, 6, 7, -100]],
    )


def test_pads_of_a_real_tokens_id_hide_no_real_token():
    """Id 0 is <s> in some vocabularies and <unk> in LLaMA's."""
    row = {"input_ids": [0, 0, 5], "labels": [-100, 0, 5]}
    assert_batch(
        RightPadCollator(0)([row, LONG]),
        input_ids=[[0, 0, 5, 0], [1, 5, 6, 7]],
        attention_mask=[[1, 1, 1, 0], [1, 1, 1, 1]],
        position_ids=[[0, 1, 2, 3], [0, 1, 2, 3]],
        labels=[[-100, 0, 5, -100], [-100, 5, 6, 7]],
        shift_labels=[[0, 5, -100, -100], [5, 6, 7, -100]],
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_equal_lengths_need_no_padding(rows):
    assert_batch(
        RightPadCollator(9)([LONG] * rows),
        input_ids=[[1, 5, 6, 7]] * rows,
        attention_mask=[[1, 1, 1, 1]] * rows,
        position_ids=[[0, 1, 2, 3]] * rows,
        labels=[[-100, 5, 6, 7]] * rows,
        shift_labels=[[5, 6, 7, -100]] * rows,
    )


def test_padding_behind_a_packed_row_is_one_more_document():
    """Its positions start again: nothing of a real document's groups or memory goes into it."""
    row = {"input_ids": [1, 5, 1, 6, 7], "labels": [-100, 5, -100, 6, 7], "position_ids": [0, 1, 0, 1, 2]}
    short = {"input_ids": [1, 8], "labels": [-100, 8], "position_ids": [0, 1]}
    assert_batch(
        RightPadCollator(9)([short, row]),
        input_ids=[[1, 8, 9, 9, 9], [1, 5, 1, 6, 7]],
        attention_mask=[[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]],
        labels=[[-100, 8, -100, -100, -100], [-100, 5, -100, 6, 7]],
        shift_labels=[[8, -100, -100, -100, -100], [5, -100, 6, 7, -100]],
        position_ids=[[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]],
    )


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 11])
def test_the_parts_of_split_rows_are_the_rows(parts):
    """Padded on the right to a multiple of the parts; labels are shifted before the split."""
    samples = [SHORT, LONG]
    whole = RightPadCollator(9)(samples)
    split = [RightPadCollator(9, part, parts)(samples) for part in range(parts)]
    longest = whole["input_ids"].shape[1]
    more = -longest % parts
    assert {part["input_ids"].shape[1] for part in split} == {(longest + more) // parts}
    fills = {"input_ids": 9, "attention_mask": 0, "labels": -100, "shift_labels": -100}
    for name, rows in whole.items():
        joined = torch.cat([part[name] for part in split], dim=1)
        assert torch.equal(joined[:, :longest], rows), name
        if name in fills:
            assert (joined[:, longest:] == fills[name]).all(), name


@pytest.mark.parametrize("parts", [1, 2])
def test_rows_are_identified_whole(parts):
    """By all tokens and the number of them, whichever part a batch holds."""
    for part in range(parts):
        batch = RightPadCollator(9, part, parts, with_rows=True)([SHORT, LONG])
        assert batch["rows"].tolist() == [[row_key([1, 8]), 2], [row_key([1, 5, 6, 7]), 4]]
        assert batch["position_ids"].tolist() == [list(range(4))[part * 4 // parts :][: 4 // parts]] * 2


def test_samples_are_not_changed():
    sample = {"input_ids": [1, 8], "labels": [-100, 8]}
    RightPadCollator(9)([sample, LONG])
    assert sample == SHORT


def test_padding_cannot_change_a_loss(tiny_llama):
    """The same rows alone and padded, through Hugging Face's own loss."""
    short = {"input_ids": [0, 8, 9, 1], "labels": [-100, 8, 9, 1]}
    long = {"input_ids": [0, *range(20, 30), 1], "labels": [-100, *range(20, 30), 1]}
    collate = RightPadCollator(1)

    def summed(batch) -> float:
        targets = int((batch["labels"][:, 1:] != -100).sum())
        return tiny_llama(**batch).loss.item() * targets

    apart = summed(collate([short])) + summed(collate([long]))
    assert summed(collate([short, long])) == pytest.approx(apart, rel=1e-5)


def test_shifted_labels_are_hugging_faces_own(tiny_llama):
    """Its loss from `labels` alone, which it shifts itself, and from what the collator shifted."""
    batch = RightPadCollator(1)([{"input_ids": [0, 8, 9, 1], "labels": [-100, -100, 9, 1]}, LONG])
    shifted = batch.pop("shift_labels")
    expected = tiny_llama(**batch).loss
    batch["labels"] = torch.zeros_like(shifted)  # present, so that a loss is computed, and not read
    assert torch.equal(tiny_llama(**batch, shift_labels=shifted).loss, expected)
