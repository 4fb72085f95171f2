"""The fused LoRA layer against PEFT's, and with dropout against the formula with the same mask."""

import copy

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from component.float8 import product
from component.memory import linear
from component.memory.linear import FusedLoRALayer, LoRALinear, accumulate, as_returned, fuse_lora, use_float8
from component.model import disable_cpu_repacking
from tests.reference.float8 import float8_card

INPUTS, OUTPUTS, RANK, ALPHA = 64, 112, 5, 8
TOKENS = 37


class Base(nn.Module):
    """A linear layer to add LoRA to."""

    def __init__(self, bias: bool):
        super().__init__()
        self.proj = nn.Linear(INPUTS, OUTPUTS, bias=bias)

    def forward(self, x):
        return self.proj(x)


def lora(bias: bool = True, kind: str = "fp32", dropout: float = 0.0, **options):
    """PEFT's layer with nonzero B, in training mode, and a fused copy."""
    model = Base(bias)
    if bias:
        nn.init.normal_(model.proj.bias)
    if kind == "nf4":
        weight, own_bias = model.proj.weight.data, model.proj.bias
        model.proj = bnb.nn.Linear4bit(INPUTS, OUTPUTS, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
        model.proj.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        model.proj.bias = own_bias
        model.to("cpu")
        disable_cpu_repacking(model)
    if kind == "bf16":
        model.to(torch.bfloat16)
    config = LoraConfig(target_modules=["proj"], r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, **options)
    theirs = get_peft_model(model, config).base_model.model.proj.train()
    nn.init.normal_(theirs.lora_B["default"].weight, std=0.2)
    ours = copy.deepcopy(theirs)
    holder = nn.ModuleList([ours])
    fuse_lora(holder)
    return theirs, ours


def run(layer, x, grad):
    """Output, and gradients of the input, A and B."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad


def assert_close(ours, theirs, tolerance: float = 1e-5):
    for found, expected in zip(ours, theirs, strict=True):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert float(expected.abs().max()) > 0
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("shape", [(TOKENS,), (3, TOKENS), (1, 1), (2, 3, 4)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_equals_peft(kind, bias, shape):
    theirs, ours = lora(bias, kind)
    assert isinstance(ours, FusedLoRALayer)
    x, grad = torch.randn(*shape, INPUTS), torch.randn(*shape, OUTPUTS)
    assert_close(run(ours, x, grad), run(theirs, x, grad))


def test_strided_inputs_and_gradients():
    theirs, ours = lora()
    x = torch.randn(INPUTS, TOKENS, 2).permute(2, 1, 0)
    grad = torch.randn(2, OUTPUTS, TOKENS).transpose(1, 2)
    assert_close(run(ours, x, grad), run(theirs, x, grad))
    one = torch.ones(()).expand(2, TOKENS, OUTPUTS)  # the gradient of a sum: all strides are zero
    assert_close(run(ours, x, one), run(theirs, x, one))


def test_scaling_of_the_adapter():
    for options in ({"use_rslora": True}, {"rank_pattern": {"proj": 3}}, {"alpha_pattern": {"proj": 3.0}}):
        theirs, ours = lora(**options)
        x, grad = torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, OUTPUTS)
        assert_close(run(ours, x, grad), run(theirs, x, grad))
    assert ours.projection.scaling == 3.0 / RANK


def test_replaced_factors_and_scaling_are_used():
    """Loading, rescaling and sharding change PEFT's module after it was fused."""
    theirs, ours = lora()
    x, grad = torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, OUTPUTS)
    before = run(ours, x, grad)
    a, b = torch.randn(RANK, INPUTS), torch.randn(OUTPUTS, RANK)
    for layer in (theirs, ours):
        layer.lora_A["default"].weight = nn.Parameter(a.clone())
        layer.lora_B["default"].weight = nn.Parameter(b.clone())
        layer.set_scale("default", 3.0)
    after = run(ours, x, grad)
    assert_close(after, run(theirs, x, grad))
    assert all(float((old - new).abs().max()) > 0.1 for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_half_of_lora_frozen(frozen):
    theirs, ours = lora()
    for layer in (theirs, ours):
        getattr(layer, frozen)["default"].weight.requires_grad_(False)
    holder = nn.ModuleList([ours])
    ours.projection = LoRALinear(ours)
    assert len(holder[0].projection.parameters) == 1
    x, grad = torch.randn(TOKENS, INPUTS, requires_grad=True), torch.randn(TOKENS, OUTPUTS)
    trained = "lora_B" if frozen == "lora_A" else "lora_A"
    for layer in (theirs, ours):
        layer(x).backward(grad)
        assert getattr(layer, frozen)["default"].weight.grad is None
    assert_close([getattr(ours, trained)["default"].weight.grad], [getattr(theirs, trained)["default"].weight.grad])


def test_all_of_lora_frozen():
    """Gradients flow through it to the layers below."""
    theirs, ours = lora()
    for layer in (theirs, ours):
        layer.requires_grad_(False)
    x, grad = torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, OUTPUTS)
    assert_close(run(ours, x, grad)[:2], run(theirs, x, grad)[:2])


def test_input_without_gradient():
    theirs, ours = lora()
    x, grad = torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, OUTPUTS)
    expected = run(theirs, x, grad)[2:]
    ours(x).backward(grad)
    assert_close([ours.lora_A["default"].weight.grad, ours.lora_B["default"].weight.grad], expected)


def test_autocast_and_half_precision():
    """fp32 LoRA on a bf16 base under autocast: fp32 gradients for LoRA, the input's gradient in its own dtype."""
    theirs, ours = lora(kind="bf16")
    x, grad = torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, OUTPUTS)
    exact = copy.deepcopy(theirs).float()
    expected = run(exact, x, grad)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x.requires_grad_())
        assert y.dtype == theirs(x).dtype == torch.bfloat16
    y.backward(grad.bfloat16())
    found = y.float().detach(), x.grad, ours.lora_A["default"].weight.grad, ours.lora_B["default"].weight.grad
    assert_close(found, expected, tolerance=2e-2)


def test_weight_is_held_only_inside():
    _, ours = lora(kind="nf4")
    projection = ours.projection
    with projection.holding_weight():
        assert projection.weight(torch.float32) is projection.weight(torch.float32)
    assert projection._held is None
    assert projection.weight(torch.float32) is not projection.weight(torch.float32)
    with pytest.raises(ZeroDivisionError), projection.holding_weight():
        raise ZeroDivisionError
    assert projection._held is None


def test_backward_accumulates():
    """Weight gradients over tiles of tokens, and an input's gradient onto another."""
    _, ours = lora()
    projection, x, grad = ours.projection, torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, OUTPUTS)
    low = projection.low(x, None)
    untiled, tiled, other = {}, {}, torch.randn(TOKENS, INPUTS)
    expected = other + projection.backward(grad, x, low, None, untiled)
    found = other.clone()
    for start in range(0, TOKENS, 7):
        part = slice(start, start + 7)
        assert projection.backward(grad[part], x[part], low[part], None, tiled, add_to=found[part]) is not None
    assert_close([found, *tiled.values()], [expected, *untiled.values()])
    assert list(tiled) == list(untiled)
    assert projection.backward(grad, x, low, None, {}, need_x=False) is None


def test_sums_over_many_tiles_are_in_fp32():
    """256 + 63 x 1: in bf16 each 256 + 1 is 256."""
    parameter, sums = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16)), {}
    for value in [256.0] + 63 * [1.0]:
        ones = torch.ones(1, 1, dtype=torch.bfloat16)
        accumulate(sums, parameter, ones, value * ones, 1.0)
    assert (sums[parameter].dtype, float(sums[parameter])) == (torch.float32, 319.0)
    assert [gradient.dtype for gradient in as_returned(sums, [parameter])] == [torch.bfloat16]


# ---- FP8


def rounded(x):
    """Each row to the nearest numbers of e4m3 after its largest is scaled to 448."""
    scale = x.abs().amax(1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_products_in_float8(kind, bias):
    """The frozen weight meets rounded numbers, LoRA's matrices and gradients exact ones."""
    theirs, ours = lora(bias, kind)
    use_float8(nn.ModuleList([ours]))
    x, grad = torch.randn(3, TOKENS, INPUTS), torch.randn(3, TOKENS, OUTPUTS)
    y, dx, *trained = run(ours, x, grad)
    exact = run(theirs, x, grad)
    assert_close(trained, exact[2:])
    flat, flat_grad = x.flatten(0, 1), grad.flatten(0, 1)
    weight = LoRALinear(theirs).weight(torch.float32).detach()
    of_rows, of_columns = rounded(weight), rounded(weight.t()).t()
    if kind == "nf4":  # all 64 inputs share the largest's scale
        of_columns = rounded(weight.reshape(1, -1)).view_as(weight)
    more = exact[0].flatten(0, 1) - flat @ weight.t()  # bias and LoRA
    more_dx = exact[1].flatten(0, 1) - flat_grad @ weight
    found = y.flatten(0, 1), dx.flatten(0, 1)
    expected = rounded(flat) @ of_rows.t() + more, rounded(flat_grad) @ of_columns + more_dx
    for ours_, wanted, unrounded in zip(found, expected, exact[:2], strict=True):
        off = (ours_ - wanted).norm() / wanted.norm()
        assert float(off) < 2e-3, "but for numbers next to a middle"
        assert float((ours_ - unrounded.flatten(0, 1)).norm() / wanted.norm()) > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_float8_on_a_gpu(kind, bias, monkeypatch):
    """As the same numbers multiplied in fp32, forward and for each gradient."""
    device = float8_card()
    ours = lora(bias, kind)[1].to(device)
    use_float8(nn.ModuleList([ours]))
    x = torch.randn(3, TOKENS, INPUTS, device=device, dtype=torch.bfloat16)
    grad = torch.randn(3, TOKENS, OUTPUTS, device=device, dtype=torch.bfloat16)
    found = run(ours, x, grad)
    monkeypatch.setattr(product, "_has_float8", lambda _: False)
    for name, ours_, expected in zip(("y", "dx", "dA", "dB"), found, run(ours, x, grad), strict=True):
        off = float((ours_.float() - expected.float()).norm() / expected.float().norm())
        assert off < 1e-2, f"{name}: off by {off:.1e}"


def test_float8_without_lora_and_in_evaluation():
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.Linear(OUTPUTS, 33)).requires_grad_(False)
    plain = copy.deepcopy(model)
    use_float8(model)
    x = torch.randn(TOKENS, INPUTS, requires_grad=True)
    y, exact = model(x), plain(x)
    hidden = rounded(x) @ rounded(plain[0].weight).t() + plain[0].bias
    torch.testing.assert_close(y, plain[1](hidden), rtol=0, atol=5e-3)  # 33 outputs are no multiple of 16
    assert not torch.allclose(y, exact, rtol=0, atol=1e-2)
    (dx,) = torch.autograd.grad(y.sum(), x)
    off = dx - torch.ones(TOKENS, 33) @ plain[1].weight @ plain[0].weight
    assert 1e-3 < float(off.norm() / dx.norm()) < 0.06
    assert torch.equal(model.eval()(x), exact)


# ---- dropout


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_dropout_against_the_formula(probability, kind):
    """y = W x + b + s B A (mask * x) and its gradients by autograd, with the call's mask."""
    _, ours = lora(kind=kind, dropout=probability)
    x, grad = torch.randn(2, TOKENS, INPUTS), torch.randn(2, TOKENS, OUTPUTS)
    torch.manual_seed(11)
    found = run(ours, x, grad)
    torch.manual_seed(11)
    mask = linear._drop(torch.ones(2 * TOKENS, INPUTS), probability, ours.projection.draw_seed())
    assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - probability)])
    a, b = (getattr(ours, name)["default"].weight.detach().requires_grad_() for name in ("lora_A", "lora_B"))
    x = x.detach().clone().requires_grad_()
    weight = ours.projection.weight(torch.float32).detach()
    y = F.linear(x, weight, ours.projection.base.bias) + ALPHA / RANK * (x * mask.view(x.shape)) @ a.t() @ b.t()
    y.backward(grad)
    assert_close(found, (y.detach(), x.grad, a.grad, b.grad))
    assert not torch.equal(found[1], run(lora(kind=kind)[1], x, grad)[1])


def test_dropout_keeps_the_expectation():
    x = torch.ones(400, 500)
    for probability in (0.1, 0.6):
        dropped = linear._drop(x, probability, 3)
        share = float((dropped == 0).float().mean())
        assert share == pytest.approx(probability, abs=0.005)  # 10 standard deviations
        assert float(dropped.mean()) == pytest.approx(1, abs=0.01)
        columns = dropped.mean(0)
        assert float(columns.std()) < 0.1
    assert linear._drop(x, 0.5, None) is x
    assert linear._drop(x, 0.0, 3) is x


def test_the_mask_is_linear_and_its_own_backward():
    x, z = torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, INPUTS)
    drop = lambda tensor: linear._drop(tensor, 0.3, 7)  # noqa: E731
    torch.testing.assert_close(drop(x + 2 * z), drop(x) + 2 * drop(z))
    torch.testing.assert_close((drop(x) * z).sum(), (x * drop(z)).sum())
    assert torch.equal(drop(x) == 0, drop(x.bfloat16()) == 0)  # for any dtype


def test_masks_differ_between_calls_and_repeat_from_an_rng_state():
    _, ours = lora(dropout=0.5)
    x = torch.randn(TOKENS, INPUTS)
    state = torch.get_rng_state()
    outputs = [ours(x).detach() for _ in range(3)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    torch.set_rng_state(state)
    assert all(torch.equal(ours(x), output) for output in outputs)


def test_the_mask_is_the_same_without_gradients():
    """A recomputed layer first runs without gradients; both passes need the same mask."""
    _, ours = lora(dropout=0.5)
    x = torch.randn(TOKENS, INPUTS)
    state = torch.get_rng_state()
    with torch.no_grad():
        first = ours(x)
    torch.set_rng_state(state)
    assert torch.equal(ours(x), first)


def test_evaluation_is_pefts_and_draws_nothing():
    theirs, ours = lora(dropout=0.5)
    x, state = torch.randn(TOKENS, INPUTS), torch.get_rng_state()
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(torch.get_rng_state(), state)


# ---- supported layers


def test_a_disabled_or_merged_adapter():
    theirs, ours = lora()
    x = torch.randn(TOKENS, INPUTS)
    for layer in (theirs, ours):
        layer.enable_adapters(False)
    assert torch.equal(ours(x), theirs.base_layer(x))
    for layer in (theirs, ours):
        layer.enable_adapters(True)
    expected = theirs(x)
    ours.merge()
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    ours.unmerge()
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


def test_supported_layers():
    assert LoRALinear.supports(lora()[0])
    frozen = nn.Linear(3, 4).requires_grad_(False)
    assert LoRALinear.supports(frozen)
    assert not LoRALinear.supports(nn.Linear(3, 4))
    assert not LoRALinear.supports(nn.Conv1d(3, 4, 1).requires_grad_(False))


def test_a_second_active_adapter_is_not_ignored():
    model = get_peft_model(Base(True), LoraConfig(target_modules=["proj"], r=RANK, lora_alpha=ALPHA))
    model.add_adapter("second", LoraConfig(target_modules=["proj"], r=RANK, lora_alpha=ALPHA))
    layer = model.base_model.model.proj.train()
    for name in ("default", "second"):
        nn.init.normal_(layer.lora_B[name].weight, std=0.2)
    assert LoRALinear.supports(layer)
    x = torch.randn(TOKENS, INPUTS)
    first = layer(x)
    layer.set_adapter(["default", "second"])
    expected = layer(x)
    assert not torch.allclose(first, expected, atol=1e-2)
    assert not LoRALinear.supports(layer)
    fuse_lora(model)
    torch.testing.assert_close(layer(x), expected)
    # and one that becomes active only after the layers were fused
    layer.set_adapter("default")
    fuse_lora(model)
    assert isinstance(layer, FusedLoRALayer)
    layer.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_adapters_stay_pefts(options):
    theirs, ours = lora(**options)
    assert not isinstance(ours, FusedLoRALayer)
    x, grad = torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, OUTPUTS)
    assert_close(run(ours, x, grad), run(theirs, x, grad))
