"""NF4 weights to quantize to FP8, and when two FP8 matrices are the same."""

import bitsandbytes as bnb
import pytest
import torch

from component.float8.product import CAPABILITY, Float8Matrix
from component.model import disable_cpu_repacking


def nf4(
    outputs: int, inputs: int, device: str = "cpu", storage: torch.dtype = torch.uint8, nested: bool = True
) -> bnb.nn.Params4bit:
    """A weight, double-quantized if `nested`, whose rows and columns differ in size by orders of magnitude."""
    weight = torch.randn(outputs, inputs) * torch.logspace(-2, 1, outputs)[:, None] * torch.logspace(0, -2, inputs)
    layer = bnb.nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=nested, quant_storage=storage
    )
    layer.to(device)
    disable_cpu_repacking(layer)
    return layer.weight


def dequantized(weight: bnb.nn.Params4bit) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def float8_card():
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("needs an Ada, Hopper or Blackwell GPU")
    return "cuda"


def assert_same_numbers(found: Float8Matrix, expected: Float8Matrix) -> None:
    """Equal but for ties: a number a hair above the middle may be rounded to the neighbour below it."""
    assert found.values.shape == expected.values.shape
    torch.testing.assert_close(found.scales.cpu()[: found.rows], expected.scales[: found.rows], rtol=1e-6, atol=0)
    differ = found.values.cpu().float() != expected.values.float()
    assert int(differ.sum()) <= 3 + 1e-4 * differ.numel()
    torch.testing.assert_close(
        found.values.cpu().float(),
        expected.values.float(),
        rtol=1.01 * torch.finfo(found.values.dtype).eps,
        atol=2**-9,
    )
