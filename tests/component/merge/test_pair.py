"""Does a module of a merged model do what PEFT's module does? Differences, and their bounds."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

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
    hidden = torch.randn(4, 3, 8)
    expected = torch.cat([hidden[:2] @ weight.t(), hidden[2:] @ weight.bfloat16().float().t()])
    torch.testing.assert_close(pair.transform(hidden), expected)
