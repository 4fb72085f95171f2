"""Triton kernels against the same numbers by plain operations.

Without a GPU, Triton's interpreter runs them, if Triton is installed: TRITON_INTERPRET=1 python -m pytest FILE
It does not round to FP8 as GPUs do, so there kernels write fp32, and torch rounds.
"""

import os

import pytest
import torch

from component.float8 import product
from component.float8.product import E4M3, E5M2, TINY, Float8Matrix, quantize, quantize_weight
from tests.reference.float8 import assert_same_numbers, float8_card, nf4

pytest.importorskip("triton")
on_cpu = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=on_cpu), pytest.param("cuda", marks=pytest.mark.gpu)]
)


@devices
@pytest.mark.parametrize("shape", [(1, 64), (37, 112), (3, 11008), (2, 32000)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_rows(shape, dtype, device):
    from component.float8.kernel import quantize_rows

    device = float8_card() if device == "cuda" else device
    wide = torch.randn(shape[0], 2 * shape[1], dtype=torch.bfloat16) * torch.logspace(-9, 2, shape[0])[:, None]
    wide[0, 0] = 0
    for x in (wide[:, : shape[1]], wide[:, ::2], wide.float()[:, : shape[1]]):  # strided, too
        expected = quantize(x, dtype)
        out = torch.full(expected.values.shape, 7.0, device=device).to(dtype if device == "cuda" else torch.float32)
        scales = quantize_rows(x.to(device), out, torch.finfo(dtype).max, TINY)
        assert_same_numbers(Float8Matrix(out.to(dtype), scales, len(x)), expected)
        assert not out[len(x) :].float().any()
        assert bool(scales.isfinite().all())


@devices
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(16, 64), (1040, 192), (80, 4096)])
@pytest.mark.parametrize(("storage", "nested"), [(torch.uint8, True), (torch.bfloat16, True), (torch.uint8, False)])
def test_nf4(shape, transposed, storage, nested, device):
    from component.float8.kernel import nf4_to_float8

    weight = nf4(*shape, float8_card() if device == "cuda" else device, storage, nested)
    assert weight.quant_state.nested == nested
    inverse, scales = product._weight_scales(weight.quant_state, transposed)
    found = torch.empty(shape[::-1] if transposed else shape, device=device)
    found = found.to(E4M3) if device == "cuda" else found
    nf4_to_float8(weight.data, inverse, weight.quant_state, found, transposed)
    found = found.to(E4M3)
    full = product._dequantized(weight)
    expected = ((full.t() if transposed else full) * inverse).to(E4M3)
    wanted = Float8Matrix(expected.cpu(), scales.cpu(), len(expected))
    assert_same_numbers(Float8Matrix(found, scales, len(expected)), wanted)
    assert float(found.float().abs().max()) == 448


@pytest.mark.gpu
def test_a_gpu_uses_them(monkeypatch):
    """Without the plain operations."""
    device = float8_card()
    monkeypatch.setattr(product, "_rounded", None)
    assert quantize(torch.randn(3, 64, device=device)).rows == 3
    assert quantize_weight(nf4(64, 128, device), transposed=True).values.shape == (128, 64)
