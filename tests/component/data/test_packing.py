"""How do documents fill rows? Each once, whole, tightly; and a packed row trains as its documents would alone."""

import itertools
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from component.attention.interface import use_shift_short_attention
from component.data.collator import RightPadCollator
from component.data.packing import OPEN_ROWS, PackedRows, join, pack, pack_stream
from tests.reference.plain_path import (
    GROUP,
    assert_same,
    differs,
    gradients,
    random_batch,
    tiny_base,
    tiny_config,
    under_plan,
    with_lora,
)
from tests.reference.shift_short import LOOP


def packed(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """The lengths that share each row."""
    rows = pack(np.array(lengths), row_tokens)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths))), "each document in exactly one row"
    assert all(rows), "no empty row"
    found = [[lengths[document] for document in row] for row in rows]
    assert max(map(sum, found)) <= row_tokens
    return found


@pytest.mark.parametrize(
    ("lengths", "row_tokens", "rows"),
    [
        ([5], 5, [[5]]),
        ([1], 5, [[1]]),
        ([5, 5, 5], 5, [[5], [5], [5]]),
        ([1, 1, 1, 1, 1, 1], 5, [[1, 1, 1, 1, 1], [1]]),
        ([2, 5, 3], 5, [[5], [3, 2]]),
        ([1, 9, 2, 8, 10], 10, [[10], [9, 1], [8, 2]]),
        # the fullest row that has room, not the first one: 3 goes to the 7, 4 to the 6
        ([6, 7, 4, 3], 10, [[7, 3], [6, 4]]),
        ([5, 6, 7, 3], 10, [[7, 3], [6], [5]]),
    ],
)
def test_rows_by_hand(lengths, row_tokens, rows):
    assert packed(lengths, row_tokens) == rows


def test_the_fullest_row_with_room_is_taken():
    """The 2 fits behind 7, 6 and 5 alike; the first row of all has no room."""
    assert pack(np.array([5, 6, 7, 9, 2]), 10) == [[3], [2, 4], [1], [0]]


def test_of_equal_documents_the_earlier_one_comes_first():
    assert pack(np.array([4, 4, 4, 4, 4]), 8) == [[0, 1], [2, 3], [4]]


def test_the_same_lengths_give_the_same_rows():
    lengths = np.random.default_rng(0).integers(1, 64, 500)
    assert pack(lengths, 64) == pack(lengths.copy(), 64)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_decreasing_document_by_document(seed):
    """A slow twin, that looks at every row for every document."""
    lengths = np.random.default_rng(seed).integers(1, 41, 200)
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(40 - length)
    assert sorted(40 - sum(row) for row in packed(lengths.tolist(), 40)) == sorted(rooms)


def fewest_rows(lengths: list[int], row_tokens: int) -> int:
    """By trying every row for every document."""

    def search(left: list[int], rooms: tuple[int, ...], most: int) -> bool:
        if not left:
            return True
        length, rest = left[0], left[1:]
        for room in set(rooms):
            if room >= length:
                others = list(rooms)
                others[others.index(room)] = room - length
                if search(rest, tuple(sorted(others)), most):
                    return True
        return len(rooms) < most and search(rest, tuple(sorted((*rooms, row_tokens - length))), most)

    longest_first = sorted(lengths, reverse=True)
    return next(most for most in itertools.count(1) if search(longest_first, (), most))


def test_few_rows_more_than_the_fewest():
    """11/9 of the fewest and 6/9 of a row: the bound of best fit decreasing, on small cases of many kinds."""
    generator, spared = random.Random(0), 0
    for _ in range(300):
        row_tokens = generator.randint(4, 30)
        lengths = [generator.randint(1, row_tokens) for _ in range(generator.randint(1, 9))]
        rows, fewest = len(packed(lengths, row_tokens)), fewest_rows(lengths, row_tokens)
        assert fewest <= rows <= 11 / 9 * fewest + 6 / 9, (lengths, row_tokens)
        spared += len(lengths) - rows
    assert spared > 300  # something was packed


# --- rows of tokens ---


def document(number: int, length: int) -> dict[str, list[int]]:
    """Its tokens tell which one it is, and in which order they were."""
    ids = [100 * number + place for place in range(length)]
    return {"input_ids": ids, "labels": [-100, *ids[1:]]}


def test_joined_documents():
    assert join([document(1, 3), document(2, 1), document(3, 2)]) == {
        "input_ids": [100, 101, 102, 200, 300, 301],
        "labels": [-100, 101, 102, -100, -100, 301],
        "position_ids": [0, 1, 2, 0, 0, 1],
    }


@pytest.fixture
def data_set() -> Dataset:
    return Dataset.from_list([document(number, length) for number, length in enumerate([4, 8, 3, 1, 5])])


def test_rows_of_a_data_set(data_set):
    rows = PackedRows(data_set, np.array([4, 8, 3, 1, 5]), 8)
    assert [rows[at] for at in range(len(rows))] == [
        join([document(1, 8)]),
        join([document(4, 5), document(2, 3)]),
        join([document(0, 4), document(3, 1)]),
    ]
    assert rows.fill == 21 / 24


def test_rows_of_a_selection(data_set):
    """Dropped samples leave a data set whose rows are looked up by an index."""
    chosen = data_set.select([4, 0, 3])
    assert chosen._indices is not None
    rows = PackedRows(chosen, np.array([5, 4, 1]), 6)
    assert [rows[at] for at in range(len(rows))] == [join([document(4, 5), document(3, 1)]), join([document(0, 4)])]


# --- streams ---


def stream_of(lengths: list[int]) -> list[dict]:
    return [document(number, length) for number, length in enumerate(lengths)]


def documents_of(rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document in the rows, told apart by positions alone."""
    found = []
    for row in rows:
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            found.append((row["input_ids"][start:end], row["labels"][start:end]))
    return found


@pytest.mark.parametrize("count", [0, 1, 2, OPEN_ROWS, OPEN_ROWS + 1, 200])
def test_a_stream_loses_nothing(count):
    """At the end neither, and in no order of documents."""
    lengths = np.random.default_rng(count).integers(1, 33, count).tolist()
    for order in (lengths, sorted(lengths), sorted(lengths, reverse=True)):
        documents = stream_of(order)
        rows = list(pack_stream(iter(documents), 32))
        assert all(0 < len(row["input_ids"]) <= 32 for row in rows)
        expected = [(one["input_ids"], one["labels"]) for one in documents]
        assert sorted(documents_of(rows)) == sorted(expected)


def test_a_stream_packs():
    lengths = np.random.default_rng(1).integers(1, 33, 500).tolist()
    rows = list(pack_stream(stream_of(lengths), 32))
    assert len(rows) <= 1.1 * sum(lengths) / 32


def test_a_stream_by_hand():
    """Into the fullest row with room, not the first; the fullest row leaves when one too many is open."""
    lengths = [6, 7, 3, *[8] * (OPEN_ROWS - 2), 9]
    rows = list(pack_stream(stream_of(lengths), 10))
    assert rows[0] == join([document(1, 7), document(2, 3)])
    assert len(rows) == OPEN_ROWS + 1
    assert rows[1] == join([document(0, 6)])


def test_a_stream_keeps_few_rows_open():
    """How many tokens were taken but not yet given out, however long the stream is."""
    taken = given = most = 0

    def documents():
        nonlocal taken, most
        for number, length in enumerate(np.random.default_rng(2).integers(1, 33, 3000).tolist()):
            taken += length
            most = max(most, taken - given)
            yield document(number, length)

    for row in pack_stream(documents(), 32):
        given += len(row["input_ids"])
    assert taken == given
    assert most <= (OPEN_ROWS + 1) * 32


# --- a packed row trains as its documents would alone ---

ROWS = [[13, 1, 25, 6, 3], [GROUP, GROUP // 2, 5, 2]]  # tokens of each document; odd, shorter than half a group, ...
MEMORY_OPTIONS = {
    "memory plan": {
        "keep_layers": 1,
        "keep_attention_layers": 1,
        "keep_attention_output": True,
        "offload_activations": True,
        "mlp_tile_tokens": 17,
        "loss_chunk_tokens": 11,
    },
    "all recomputed": {"keep_attention_output": True},
    "no memory plan": None,
}


def sample(length: int, seed: int) -> dict[str, list[int]]:
    ids = random_batch(1, length, seed)["input_ids"][0].tolist()
    return {"input_ids": ids, "labels": [-100, *ids[1:]]}


DOCUMENTS = [[sample(length, 10 * row + at) for at, length in enumerate(lengths)] for row, lengths in enumerate(ROWS)]


def summed(model: nn.Module, batches: list[dict]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Summed losses of all batches together, and the gradients."""
    model.train()
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=torch.tensor(1)).loss
        loss.backward()
        total += loss.item()
    return [total], gradients(model)


def model_of(family: str, s2: bool, **options) -> nn.Module:
    config = tiny_config(family, s2=s2)
    if not s2:  # what train.py does for packing without S2-Attn
        use_shift_short_attention(config, None)
    return with_lora(tiny_base(config), **options)


def plain_model(family: str, s2: bool, **options) -> nn.Module:
    """Stock transformers: its own full attention, or the slow loop for S2-Attn."""
    config = tiny_config(family, s2=s2)
    if s2:
        config._attn_implementation = LOOP
    return with_lora(tiny_base(config), **options)


def alone(document: dict) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row]) for name, row in document.items()}


@pytest.mark.parametrize("plan", MEMORY_OPTIONS)
@pytest.mark.parametrize("s2", [True, False], ids=["S2-Attn", "full attention"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_packed_batch_is_the_sum_of_its_documents(family, s2, plan):
    """Loss and every gradient; two rows of different lengths, so that one is padded behind."""
    options = {"train_embedding": True, "train_norm": True}
    model = model_of(family, s2, **options)
    plain = plain_model(family, s2, **options)
    ours = under_plan(model, **MEMORY_OPTIONS[plan]) if MEMORY_OPTIONS[plan] is not None else model
    batch = RightPadCollator(7)([join(documents) for documents in DOCUMENTS])
    assert not batch["attention_mask"].all()
    result = summed(ours, [batch])
    apart = [alone(document) for documents in DOCUMENTS for document in documents if len(document["input_ids"]) > 1]
    assert_same(result, summed(plain, apart), tolerance=5e-5)
    del batch["position_ids"]
    assert differs(result, summed(ours, [batch]))  # without positions documents see each other


def test_neighbours_in_a_row_change_nothing():
    """A document's hidden states are the same wherever it stands and whoever stands before and behind it."""
    model = model_of("llama", True).train()
    first, *others = DOCUMENTS[0]
    rows = [join([first, *others]), join([*others, first]), join([first])]
    outs = []
    for row in rows:
        inputs = {name: torch.tensor([values]) for name, values in row.items() if name != "labels"}
        outs.append(model(**inputs).logits[0])
    length = len(first["input_ids"])
    torch.testing.assert_close(outs[0][:length], outs[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outs[1][-length:], outs[2], atol=1e-5, rtol=1e-5)
