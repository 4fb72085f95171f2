"""Does a module of a merged model do what PEFT's module does? Differences, and their bounds."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from component.merge import pair as merge_pair
from component.merge.pair import Difference, Differences, Pair, Side, Source
from component.storage.tensor_reader import tensors_in


def test_a_difference_by_hand():
    """3-4-5: the norms of all parts add up as squares."""
    difference = Difference("q_proj", bound=0.5)
    difference.add(torch.tensor([6.0]), torch.tensor([9.0]))
    difference.add(torch.tensor([8.0]), torch.tensor([4.0]))
    assert difference.relative == 0.5
    assert difference.is_rounding
    difference.add(torch.tensor([0.0]), torch.tensor([0.1]))
    assert not difference.is_rounding


def test_nothing_differs_from_nothing():
    difference = Difference("bias", bound=0.1)
    difference.add(torch.zeros(3), torch.zeros(3))
    assert difference.is_rounding
    assert difference.relative == 0.0
    difference.add(torch.zeros(3), torch.ones(3))
    assert not difference.is_rounding
    assert difference.relative == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_no_rounding(value):
    difference = Difference("q_proj", bound=0.1)
    difference.add(torch.ones(3), torch.tensor([1.0, value, 1.0]))
    assert not difference.is_rounding
    assert difference.relative == math.inf


def pair_of(tmp_path, weight: torch.Tensor, module: nn.Module, dtype: torch.dtype) -> tuple[Pair, Differences]:
    """A module and its own weight in `dtype`."""
    found, sides = Differences(), []
    for name, values in (("ours", weight), ("theirs", weight.to(dtype))):
        save_file({"weight": values}, tmp_path / name)
        stored = tensors_in((tmp_path / name).rename(tmp_path / f"{name}.safetensors"))["weight"]
        sides.append(Side(module.to("meta"), {"weight": Source(stored)}))
    return Pair("q_proj", *sides, found), found


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-7], ids=["normal", "subnormal", "rounded to almost nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_rounding_is_within_the_bound(tmp_path, kind, dtype, scale):
    """Also of weights that are too small for fp16's exponent: 1e-7 is rounded to a multiple of 6e-8."""
    module = nn.Linear(300, 200, bias=False) if kind == "linear" else nn.Embedding(200, 300)
    pair, found = pair_of(tmp_path, scale * torch.randn(200, 300), module, dtype)
    pair.transform(torch.randn(2, 3, 300)) if kind == "linear" else pair.embed(torch.tensor([[1], [199]]))
    difference = found.of["weight"]
    assert difference.is_rounding
    if scale == 1.0:
        assert difference.bound < 0.005
        assert difference.relative < difference.bound


def test_both_halves_are_computed(tmp_path):
    """The first half of the rows by our module, the second by theirs."""
    weight = torch.randn(5, 8)
    pair, _ = pair_of(tmp_path, weight, nn.Linear(8, 5, bias=False), torch.bfloat16)
    hidden = torch.randn(6, 4, 8)
    expected = torch.cat([hidden[:3] @ weight.t(), hidden[3:] @ weight.bfloat16().float().t()])
    torch.testing.assert_close(pair.transform(hidden), expected)


@pytest.mark.parametrize("part", [10, 20, 40, 1000])
def test_both_halves_are_embedded(tmp_path, monkeypatch, part):
    """Whichever part of the rows a token is in: the first and the last row of each."""
    monkeypatch.setattr(merge_pair, "PART", part)
    weight = torch.randn(8, 5)
    pair, _ = pair_of(tmp_path, weight, nn.Embedding(8, 5), torch.bfloat16)
    ids = torch.tensor([[0, 1], [2, 3], [4, 7], [6, 5], [7, 0], [3, 4]])
    expected = torch.cat([weight[ids[:3]], weight.bfloat16().float()[ids[3:]]])
    assert torch.equal(pair.embed(ids), expected)


# ---- parts of a weight, probes, bounds


@pytest.mark.parametrize(
    ("part", "expected"),
    [(1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]), (4, [(0, 2), (2, 4), (4, 5)]), (9, [(0, 4), (4, 5)]), (10, None)],
)
def test_parts_of_a_weight(tmp_path, monkeypatch, part, expected):
    """Of 5 rows of 2; at least a row at a time, and not sliced if all fit."""
    monkeypatch.setattr(merge_pair, "PART", part)
    pair, _ = pair_of(tmp_path, torch.randn(5, 2), nn.Linear(2, 5, bias=False), torch.float32)
    assert list(pair._parts()) == ([slice(*rows) for rows in expected] if expected else [None])
    pair.adapted.sources["lora_A.x.weight"] = Source(pair.adapted.sources["weight"].stored)
    pair.adapted.sources["weight"].quantized_from = torch.float32  # NF4's blocks do not end with rows
    assert list(pair._parts()) == [None]


def test_a_norm_is_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_pair, "PART", 4)
    pair, _ = pair_of(tmp_path, torch.randn(8), nn.RMSNorm(8), torch.float32)
    assert list(pair._parts()) == [None]


def test_the_parts_that_dora_needs(tmp_path, monkeypatch):
    """Of an embedding it takes the length of whole columns, of a linear layer that of rows."""
    monkeypatch.setattr(merge_pair, "PART", 4)
    for module, count in ((nn.Linear(2, 6, bias=False), 3), (nn.Embedding(6, 2), 1)):
        pair, _ = pair_of(tmp_path, torch.randn(6, 2), module, torch.float32)
        assert len(list(pair._parts())) == 3
        pair.adapted.sources["lora_magnitude_vector.default.weight"] = pair.adapted.sources["weight"]
        assert len(list(pair._parts())) == count


def test_probes():
    """16 inputs; before them one of zeros if there is a bias. Always the same ones."""
    plain, centered = merge_pair._probes(1000, is_centered=False), merge_pair._probes(1000, is_centered=True)
    assert (plain.shape, centered.shape) == ((16, 1000), (17, 1000))
    assert not centered[0].any()
    for values in (plain, centered[1:]):
        assert values.std(1).sub(1).abs().max() < 0.1
        assert values.mean(1).abs().max() < 0.15
    assert torch.equal(plain, merge_pair._probes(1000, is_centered=False))


def test_bounds(tmp_path):
    """Half a unit in the last place, 2^-11 in fp16; of numbers below its exponent, 2^-25."""
    pair, found = pair_of(tmp_path, torch.randn(5, 8), nn.Linear(8, 5, bias=False), torch.float16)
    pair.transform(torch.randn(2, 3, 8))
    assert found.of["weight"].bound == pytest.approx(2**-11 + 1e-4)
    assert found.of["weight"].slack == pytest.approx(2**-25 * math.sqrt(8) * math.sqrt(16 * 5))
    pair, found = pair_of(tmp_path, torch.randn(8), nn.RMSNorm(8), torch.float16)
    pair.transform(torch.randn(2, 3, 8))
    assert found.of["weight"].slack == pytest.approx(2**-25 * math.sqrt(16 * 8))


def test_slacks_of_parts_add_up_as_squares():
    """2 of 4 elements and 1 of 9: 4 and 3, together 5."""
    difference = Difference("bias", bound=0.0)
    difference.add(torch.ones(4), torch.ones(4), slack=2.0)
    difference.add(torch.ones(9), torch.ones(9) + torch.tensor([5.0] + [0.0] * 8), slack=1.0)
    assert difference.slack == pytest.approx(5.0)
    assert difference.is_rounding
    difference.add(torch.zeros(1), torch.ones(1))
    assert not difference.is_rounding


def test_rows_of_each_part_of_an_adapter():
    """LoRA's A and the transposed B of an embedding belong to all rows, the transposed A has the rows as columns."""
    names = ("weight", "bias", "lora_A.x.weight", "lora_B.x.weight", "lora_embedding_A.x", "lora_embedding_B.x")
    assert [merge_pair._axis(name) for name in names] == [0, 0, None, 0, 1, None]
    assert merge_pair._axis("lora_magnitude_vector.x.weight") == 0
