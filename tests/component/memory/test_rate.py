"""Published rates of cards, and the measured rate of this one."""

import dataclasses
import time

import pytest
import torch

from component.error import UserError
from component.memory.rate import CARDS, measured_rate, published_rate
from tests.reference.float8 import float8_card
from tests.reference.llama2_7b import LLAMA2_7B


def test_published_rates():
    """H200s kept up 678 to 717 TFLOP/s."""
    assert 678e12 < published_rate("h200").matrix < 717e12
    for name, card in CARDS.items():
        rate = published_rate(name)
        assert 0.3 < rate.matrix / card.tflops / 1e12 < 0.8
        assert rate.link < rate.bandwidth < rate.attention < rate.matrix


def test_cards_with_float8():
    """Published: Ada, Hopper and Blackwell."""
    assert {name for name in CARDS if published_rate(name).float8} == set(CARDS) - {"t4", "v100", "a100", "rtx3090"}
    rate = published_rate("h100")
    assert 1.8 < rate.float8 / rate.matrix < 2


def test_an_unknown_card_is_refused():
    with pytest.raises(UserError, match=r"--card: 'rtx4900' is none of t4, .*did you mean rtx4090"):
        published_rate("rtx4900")


def test_nothing_is_said_of_a_cpu():
    assert measured_rate(LLAMA2_7B, torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.gpu
def test_a_gpu_is_measured_in_seconds_and_leaves_random_numbers_alone():
    device, start = torch.device("cuda"), time.monotonic()
    state = torch.cuda.get_rng_state(device)
    rate = measured_rate(LLAMA2_7B, device, torch.float16)
    assert time.monotonic() - start < 10  # with the start of CUDA
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    assert rate is not None
    assert rate.float8 == 0, "not asked for"
    assert rate.link < rate.bandwidth < rate.attention < rate.matrix


@pytest.mark.gpu
def test_float8_is_faster_than_bf16():
    """By a third at least, on a card that its power limits too."""
    device = torch.device(float8_card())
    rate = measured_rate(dataclasses.replace(LLAMA2_7B, in_float8=True), device, torch.bfloat16)
    assert rate is not None
    assert 1.3 < rate.float8 / rate.matrix < 2.3
