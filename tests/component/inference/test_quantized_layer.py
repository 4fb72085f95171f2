"""How are a layer's keys and values kept in 8, 4 or 2 bits? As a slow loop over groups of numbers quantizes them."""

import math
from itertools import product

import pytest
import torch

from component.inference import quantized_layer
from component.inference.quantized_layer import BLOCK, FORMATS, BlockQuantizedLayer, BlockStore, capacities, capacity

NAMES = list(FORMATS)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(quantized_layer, "SEGMENT", 3)


def rounded(group: torch.Tensor, bits: int) -> torch.Tensor:
    """The closest of 2^bits equally spaced numbers from the smallest to the largest of a group."""
    steps = [
        float(group.min()) + (float(group.max()) - float(group.min())) / (2**bits - 1) * i for i in range(2**bits)
    ]
    closest = [min(steps, key=lambda step: abs(step - float(number))) for number in group.flatten()]
    return torch.tensor(closest).view(group.shape)


def stored(store: BlockStore) -> torch.Tensor:
    counts = [min(3, store.blocks - first) for first in range(0, store.blocks, 3)]
    return torch.cat([store.dequantize(segment, count) for segment, count in enumerate(counts)], 1)


class TestBlockStore:
    @pytest.mark.parametrize(  # groups of 8, 4 and 32 channels of a value
        ("name", "head_size"), [*product(("int8", "int4", "int2"), (8, 12)), ("int4", 96)]
    )
    def test_equals_a_loop_over_groups(self, name, head_size):
        numbers = torch.randn(2, 2 * BLOCK, head_size) * torch.rand(head_size) * 9 + 1
        keys, values = BlockStore(FORMATS[name], True), BlockStore(FORMATS[name], False)
        expected = [torch.empty_like(numbers) for _ in range(2)]
        channels = math.gcd(head_size, 64)
        for head in range(2):
            for first in (0, BLOCK):
                for channel in range(head_size):
                    here = head, slice(first, first + BLOCK), channel
                    expected[0][here] = rounded(numbers[here], FORMATS[name].bits)
            for token in range(2 * BLOCK):
                for first in range(0, head_size, channels):
                    here = head, token, slice(first, first + channels)
                    expected[1][here] = rounded(numbers[here], FORMATS[name].bits)
        for store, wanted in zip((keys, values), expected, strict=True):
            store.append(numbers)
            torch.testing.assert_close(stored(store), wanted, rtol=0, atol=1e-5)

    def test_fp8_equals_a_cast_of_each_block(self):
        numbers = torch.randn(2, 2 * BLOCK, 12) * 100
        store = BlockStore(FORMATS["fp8"], True)
        store.append(numbers)
        for head in range(2):
            for first in (0, BLOCK):
                part = numbers[head, first : first + BLOCK]
                scale = part.abs().max() / 448
                expected = (part / scale).to(torch.float8_e4m3fn).float() * scale
                torch.testing.assert_close(stored(store)[head, first : first + BLOCK], expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", NAMES)
    def test_half_precision(self, name, dtype):
        """The error of a number is at most half a step, and what 16 bits round."""
        numbers = torch.randn(2, BLOCK, 64).to(dtype)
        store = BlockStore(FORMATS[name], False)
        store.append(numbers)
        found = stored(store)
        assert found.dtype == dtype
        step = {"int8": 8 / 255, "fp8": 5 / 16, "int4": 8 / 15, "int2": 8 / 3}[name]  # of numbers within 4 of 0
        assert 0 < (found.float() - numbers.float()).abs().max() < step / 2 + 4 * torch.finfo(dtype).eps * 4

    @pytest.mark.parametrize("name", NAMES)
    def test_equal_numbers_and_zeros(self, name):
        for number in (0.0, 0.5):
            store = BlockStore(FORMATS[name], True)
            store.append(torch.full((1, BLOCK, 8), number))
            torch.testing.assert_close(stored(store), torch.full((1, BLOCK, 8), number))

    @pytest.mark.parametrize("name", NAMES)
    def test_a_block_does_not_change_when_others_follow(self, name):
        numbers = torch.randn(2, 7 * BLOCK, 8)
        at_once, one_by_one = BlockStore(FORMATS[name], True), BlockStore(FORMATS[name], True)
        at_once.append(numbers)
        first = None
        for part in numbers.split(BLOCK, 1):
            one_by_one.append(part)
            first = stored(one_by_one)[:, :BLOCK] if first is None else first
            assert torch.equal(stored(one_by_one)[:, :BLOCK], first)
        assert torch.equal(stored(one_by_one), stored(at_once))
        assert len(at_once.segments) == 3, "of 3 blocks each"


def test_memory_doubles_up_to_a_segment(monkeypatch):
    monkeypatch.setattr(quantized_layer, "SEGMENT", 128)
    assert capacities(0) == []
    assert capacities(1) == capacities(8) == [8]
    assert capacities(9) == [8, 8]
    assert capacities(129) == [8, 8, 16, 32, 64, 128]
    assert capacities(257) == [8, 8, 16, 32, 64, 128, 128]
    assert [capacity(blocks) for blocks in range(1000)] == [sum(capacities(blocks)) for blocks in range(1000)]
    assert capacity(10**12) == 10**12, "at once: a multiple of 128"
    numbers, store = torch.randn(1, 20 * BLOCK, 8), BlockStore(FORMATS["int8"], True)
    for part in numbers.split([7 * BLOCK, 10 * BLOCK, 3 * BLOCK], 1):
        store.append(part)
    assert [segment.codes.shape[1] for segment in store.segments] == [8, 8, 16]
    found = torch.cat([store.dequantize(number, blocks) for number, blocks in enumerate((8, 8, 4))], 1)
    torch.testing.assert_close(found, numbers, rtol=0, atol=0.03)


class TestLayer:
    @pytest.mark.parametrize("name", NAMES)
    def test_new_tokens_and_those_after_the_last_block_are_exact(self, name):
        keys, values = torch.randn(2, 1, 2, 500, 8)
        layer, at = BlockQuantizedLayer(name, keeps_blocks=False), 0
        for tokens in (10, 200, 1, 60, 229):
            now = slice(at, at + tokens)
            all_keys, all_values = layer.update(keys[:, :, now], values[:, :, now])
            full = at // BLOCK * BLOCK  # when the call began
            at += tokens
            assert all_keys.shape == all_values.shape == (1, 2, at, 8)
            assert torch.equal(all_keys[:, :, full:], keys[:, :, full:at])
            assert torch.equal(all_values[:, :, full:], values[:, :, full:at])
            if full:
                change = (all_values[:, :, :full] - values[:, :, :full]).abs().max()
                assert 0 < change < 3
            assert layer.get_seq_length() == at
        assert layer.get_mask_sizes(3) == (503, 0)

    @pytest.mark.parametrize("left", [0, 64, 128, 384, 448, 460, 500])
    def test_cropped(self, left):
        keys, values = torch.randn(2, 1, 2, 500, 8)
        layer, shorter = BlockQuantizedLayer("int4", False), BlockQuantizedLayer("int4", False)
        layer.update(keys, values)
        layer.crop(left - 500)
        assert layer.get_seq_length() == left
        shorter.update(keys[:, :, :left], values[:, :, :left])
        one = torch.randn(1, 2, 1, 8)
        for found, expected in zip(layer.update(one, one), shorter.update(one, one), strict=True):
            assert torch.equal(found, expected)
        assert len(layer.stores[0].segments) == len(shorter.stores[0].segments)

    def test_inside_of_a_block_is_no_place_to_crop(self):
        layer = BlockQuantizedLayer("int4", False)
        layer.update(torch.randn(1, 2, 500, 8), torch.randn(1, 2, 500, 8))
        with pytest.raises(AssertionError, match="100 tokens end inside"):
            layer.crop(-400)

    def test_reset(self):
        layer = BlockQuantizedLayer("int4", False)
        layer.update(torch.randn(1, 2, 500, 8), torch.randn(1, 2, 500, 8))
        layer.reset()
        assert layer.get_seq_length() == 0
        assert layer.update(*torch.randn(2, 1, 2, 5, 8))[0].shape == (1, 2, 5, 8)
