"""FP8 products against loops over single numbers, and on a GPU the kernels against the same numbers in fp32."""

import pytest
import torch
from torch import nn

from component.float8 import product
from component.float8.product import (
    E4M3,
    E5M2,
    Float8Matrix,
    fits,
    is_fast,
    multiply,
    quantize,
    quantize_weight,
    round_weights_for_step,
    scale_of,
)
from tests.reference.float8 import dequantized, float8_card, nf4

HALF_STEP = 2**-4  # of e4m3, which has 3 bits behind the point: the largest relative error of a rounded number


def e4m3_numbers() -> torch.Tensor:
    """All that are not negative, by the format's definition: 4 bits of exponent with bias 7, 3 bits of mantissa."""
    numbers = [0.125 * mantissa * 2.0**-6 for mantissa in range(8)]
    numbers += [(1 + mantissa / 8) * 2.0 ** (e - 7) for e in range(1, 16) for mantissa in range(8)]
    return torch.tensor(numbers[:-1], dtype=torch.float64)  # the last is NaN


@pytest.mark.parametrize("rows", [1, 15, 16, 37])
def test_rows_are_rounded_to_the_nearest_number(rows):
    x = torch.randn(rows, 48) * torch.logspace(-20, 3, rows)[:, None]
    x[0, :5] = torch.tensor([3.0, 0, -1e-4, 1e-6, 3.0])
    found, numbers = quantize(x), e4m3_numbers()
    assert found.values.shape == (-(-rows // 16) * 16, 48)
    assert not found.values[rows:].float().any()
    for row in range(rows):
        scale = float(x[row].abs().max()) / 448
        assert float(found.scales[row]) == pytest.approx(scale, rel=1e-6)
        for number, rounded in zip(x[row].tolist(), found.dequantized()[row].tolist(), strict=True):
            nearest = scale * numbers[(numbers * scale - abs(number)).abs().argmin()]
            assert abs(rounded) == pytest.approx(float(nearest), rel=1e-5)
            assert rounded * number >= 0


def test_zeros_and_infinities():
    found = quantize(torch.tensor([[0.0] * 16, [1.0] * 15 + [float("inf")]]))
    assert not found.dequantized()[0].any()
    product = multiply(found, quantize(torch.ones(16, 16)), torch.float32)
    assert not product[0].any()
    assert product[1].isnan().all(), "an overflow must not look like a number"


def test_e5m2():
    x = torch.randn(16, 32)
    found = quantize(x, E5M2)
    assert found.values.dtype == E5M2
    assert float(found.values.float().abs().max()) == 57344
    error = (found.dequantized() - x).abs() / x.abs()
    assert HALF_STEP < float(error.max()) <= 2**-3


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "nf4, blocks that span rows", "nf4 in bf16", "bf16", "fp32"])
def test_weights(kind, transposed):
    if kind.startswith("nf4"):
        storage = torch.bfloat16 if "bf16" in kind else torch.uint8
        weight = nf4(48, 112 if "span" in kind else 128, storage=storage)
        expected = dequantized(weight)
    else:
        weight = nn.Parameter(torch.randn(48, 128, dtype=torch.bfloat16 if kind == "bf16" else None))
        expected = weight.detach().float()
    expected = expected.t() if transposed else expected
    found = quantize_weight(weight, transposed=transposed)
    assert found.values.is_contiguous(), "as torch._scaled_mm wants both factors"
    assert found.dequantized().shape == expected.shape
    smallest = 2**-10 * found.scales[: found.rows]  # half of the distance between the smallest numbers
    off = (found.dequantized() - expected).abs()
    assert bool((off <= (HALF_STEP * 1.0001 * expected.abs()).maximum(smallest)).all())
    assert float(off.max()) > 0
    ratio = found.scales[: found.rows, 0] * 448 / expected.abs().amax(1)
    assert float(ratio.min()) > 0.999, "no weight may overflow"
    if not transposed or "span" in kind or "nf4" not in kind:
        assert float(ratio.max()) < 1.001
    else:  # of 64 inputs, the largest's
        assert float(ratio.min()) < 1.001


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "nf4, blocks that span rows", "bf16"])
def test_each_step_rounds_weights_in_its_own_way(kind, transposed):
    """Errors of 64 steps average out, as with the same scales they would not; activations are rounded as ever."""
    weight = (
        nf4(48, 112 if "span" in kind else 128) if "nf4" in kind else nn.Parameter(torch.randn(48, 128).bfloat16())
    )
    exact = dequantized(weight) if "nf4" in kind else weight.detach().float()
    exact = exact.t() if transposed else exact
    first, x = quantize_weight(weight, transposed=transposed), torch.randn(3, 64)
    total, activations = torch.zeros_like(exact), quantize(x).values
    try:
        for step in range(64):
            round_weights_for_step(step)
            found = quantize_weight(weight, transposed=transposed)
            ratio = found.scales[: found.rows] / first.scales[: found.rows]
            assert 1 - 1e-6 < float(ratio.min()) <= float(ratio.max()) < 2
            assert float(found.values.float().abs().max()) <= 448
            assert torch.equal(quantize(x).values.float(), activations.float())
            total += found.dequantized() - exact
    finally:
        round_weights_for_step(0)
    once = (first.dequantized() - exact).norm()
    assert (total / 64).norm() < once / 5
    assert torch.equal(quantize_weight(weight, transposed=transposed).values.float(), first.values.float())


@pytest.mark.parametrize("rows", [1, 21])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_sums_over_rows(rows, bias):
    left, right = quantize(torch.randn(rows, 32)), quantize(torch.randn(48, 32))
    added = torch.randn(48) if bias else None
    found = multiply(left, right, torch.float32, added)
    assert found.shape == (rows, 48)
    a, b = left.dequantized().double(), right.dequantized().double()
    for i in range(rows):
        for j in range(48):
            total = sum(float(a[i, k]) * float(b[j, k]) for k in range(32)) + (float(added[j]) if bias else 0)
            assert float(found[i, j]) == pytest.approx(total, abs=1e-5)


def test_a_token_does_not_depend_on_others():
    x, weight = torch.randn(37, 64) * torch.logspace(-3, 3, 37)[:, None], quantize(torch.randn(32, 64))
    together = multiply(quantize(x), weight, torch.float32)
    for row in range(37):
        alone = multiply(quantize(x[row : row + 1]), weight, torch.float32)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("tokens", [1, 33])
def test_the_error_is_that_of_rounding(tokens):
    """Rounding errs by at most 2^-4 of a number, evenly spread between two neighbours: by 2^-4 / sqrt(3) or less."""
    x, weight = torch.randn(tokens, 1024), nf4(64, 1024)
    exact = x @ dequantized(weight).t()
    found = multiply(quantize(x), quantize_weight(weight, transposed=False), torch.float32)
    # errors of both factors are independent, and so are those of the terms of a sum
    terms = (x**2) @ dequantized(weight).t() ** 2
    expected = (2 * terms).sqrt() * HALF_STEP / 3**0.5
    off = (found - exact).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0.4 < float(off) < 1


def test_which_layers_fit():
    assert fits(nn.Linear(64, 112))
    assert not fits(nn.Linear(64, 33))
    assert not fits(nn.Linear(72, 64))


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("bias", [False, True])
def test_torch_accepts_the_layouts(tokens, bias, monkeypatch):
    """torch._scaled_mm checks types, strides and sides also of tensors without data, as on a GPU."""
    x, weight = quantize(torch.randn(tokens, 64)), quantize_weight(nf4(48, 64), transposed=False)
    left, right = (Float8Matrix(m.values.to("meta"), m.scales.to("meta"), m.rows) for m in (x, weight))
    monkeypatch.setattr(product, "_has_float8", lambda _: True)
    y = multiply(left, right, torch.bfloat16, torch.empty(48, device="meta") if bias else None)
    assert (y.shape, y.dtype) == ((tokens, 48), torch.bfloat16)
    assert y.is_contiguous(), "LoRA's product is added in place"
    for wrong in (left.values[:, :40], left.values.t().contiguous().t()):
        with pytest.raises(RuntimeError, match=r"divisible by 16|row_major|cannot be multiplied"):
            multiply(left._replace(values=wrong), right, torch.bfloat16)


# ---- on a GPU


def on_cpu(matrix: Float8Matrix) -> Float8Matrix:
    return Float8Matrix(matrix.values.cpu(), matrix.scales.cpu(), matrix.rows)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 37, 4096])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_kernel_multiplies(tokens, dtype, bias):
    left, right = (
        quantize(torch.randn(tokens, 4096, device=float8_card()), dtype),
        quantize(torch.randn(1024, 4096).cuda()),
    )
    added = torch.randn(1024, device="cuda", dtype=torch.bfloat16) if bias else None
    expected = multiply(on_cpu(left), on_cpu(right), torch.float32, None if added is None else added.cpu()).cuda()
    for fast, tolerance in ((False, 3e-3), (True, 2e-2)):  # bf16's rounding is 2^-9 / sqrt(3) of it
        found = multiply(left, right, torch.bfloat16, added, fast=fast)
        assert found.shape == expected.shape
        assert found.dtype == torch.bfloat16
        off = float((found.float() - expected).norm() / expected.norm())
        assert off < tolerance, f"fast={fast}: off by {off:.1e}"


@pytest.mark.gpu
def test_products_are_tried_out():
    device = float8_card()
    assert is_fast(4096, device)
    assert not is_fast(576, device)


def test_products_without_a_gpu_are_not_fast():
    assert not is_fast(4096, torch.device("cpu"))


def test_scales_from_a_tensor_are_those_from_a_number():
    """As frozen weights have them, and activations; a rounding more or less is allowed."""
    largest = torch.rand(50, 1) + 0.01
    for limit in (448.0, 317.3, 224.5):
        for found, expected in zip(scale_of(largest, torch.tensor(limit)), scale_of(largest, limit), strict=True):
            torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)
