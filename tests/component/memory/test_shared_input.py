"""Layers with the same input, computed together, against PEFT's own modules one by one."""

import copy
import gc
import weakref

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from component.memory import shared_input
from component.memory.linear import LoRALinear, as_returned, fuse_lora
from component.memory.shared_input import SharedInputLinears, join_attention_inputs
from component.model import disable_cpu_repacking

INPUTS, OUTPUTS, TOKENS = 64, {"q_proj": 112, "k_proj": 48, "v_proj": 80}, 37
RANKS, ALPHAS = {"q_proj": 5, "k_proj": 3, "v_proj": 8}, {"q_proj": 8, "k_proj": 4, "v_proj": 2}


class Attention(nn.Module):
    """Only what reads the hidden states."""

    def __init__(self, bias: bool = True):
        super().__init__()
        for name, outputs in OUTPUTS.items():
            self.add_module(name, nn.Linear(INPUTS, outputs, bias=bias))

    def forward(self, x):
        return [getattr(self, name)(x) for name in OUTPUTS]


def in_nf4(model: nn.Module) -> nn.Module:
    for name, outputs in OUTPUTS.items():
        layer = getattr(model, name)
        base = bnb.nn.Linear4bit(INPUTS, outputs, compute_dtype=torch.float32, quant_type="nf4")
        base.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        base.bias = layer.bias
        setattr(model, name, base)
    model.to("cpu")
    disable_cpu_repacking(model)
    return model


def both(kind: str = "fp32", targets=tuple(OUTPUTS), dropout: float = 0.0):
    """PEFT's model with nonzero B, other ranks and scales in each layer, and a copy with joined layers."""
    torch.manual_seed(0)
    model = Attention() if kind == "fp32" else in_nf4(Attention())
    patterns = {"rank_pattern": RANKS, "alpha_pattern": ALPHAS}
    theirs = get_peft_model(model, LoraConfig(target_modules=list(targets), lora_dropout=dropout, **patterns)).train()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    join_attention_inputs(ours)
    return theirs, ours


def run(model, x, grads):
    """Outputs, and gradients of the input and of each trained parameter."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    outputs = model(x)
    torch.autograd.backward(outputs, grads)
    trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return [*(y.detach() for y in outputs), x.grad, *trained]


def sample(*shape: int):
    return torch.randn(*shape, INPUTS), [torch.randn(*shape, outputs) for outputs in OUTPUTS.values()]


def assert_close(ours, theirs, tolerance: float = 1e-5):
    for found, expected in zip(ours, theirs, strict=True):
        assert found.shape == expected.shape
        assert float(expected.abs().max()) > 0
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.fixture
def calls(monkeypatch):
    """The number of layers computed in each call."""
    found, apply = [], shared_input._SharedInputFunction.apply

    def counted(x, linears, *trained):
        found.append(len(linears.parts))
        return apply(x, linears, *trained)

    monkeypatch.setattr(shared_input._SharedInputFunction, "apply", counted)
    return found


@pytest.mark.parametrize("shape", [(TOKENS,), (3, TOKENS), (1, 1)])
@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_equals_peft(kind, shape, calls):
    theirs, ours = both(kind)
    x, grads = sample(*shape)
    assert_close(run(ours, x, grads), run(theirs, x, grads))
    assert calls == [3]


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "k_proj.lora_A", "q_proj.lora"])
def test_partly_frozen(frozen):
    theirs, ours = both()
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if frozen in name:
                parameter.requires_grad_(False)
    x, grads = sample(2, TOKENS)
    assert_close(run(ours, x, grads), run(theirs, x, grads))


def test_input_without_gradient():
    theirs, ours = both()
    x, grads = sample(TOKENS)
    for model in (theirs, ours):
        torch.autograd.backward(model(x), grads)
    assert_close(
        [p.grad for p in ours.parameters() if p.requires_grad],
        [p.grad for p in theirs.parameters() if p.requires_grad],
    )


def test_an_output_that_nothing_uses():
    theirs, ours = both()
    x, (grad, *_) = sample(TOKENS)
    found = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        model(leaf)[0].backward(grad)
        found.append([leaf.grad, model.base_model.model.q_proj.lora_A["default"].weight.grad])
    assert_close(found[1], found[0])


def test_dropout_masks_each_layers_input():
    """As the layers one by one, which other tests compare with the formula."""
    _, ours = both(dropout=0.3)
    alone = copy.deepcopy(ours)
    for name in OUTPUTS:
        getattr(alone.base_model.model, name).projection.calls = None
    x, grads = sample(2, TOKENS)
    found = []
    for model in (ours, alone):
        torch.manual_seed(1)
        found.append(run(model, x, grads))
    assert_close(*found)
    assert ours.base_model.model.q_proj.projection.calls.linears.factors is None


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj",)])
def test_layers_without_lora_are_not_joined(targets, calls):
    theirs, ours = both(targets=targets)
    x, grads = sample(TOKENS)
    assert_close(run(ours, x, grads), run(theirs, x, grads))
    assert calls == []


def test_a_part_without_lora():
    """As in FP8, where frozen layers are fused too."""
    theirs, _ = both(targets=("q_proj", "k_proj"))
    layers = [getattr(theirs.base_model.model, name) for name in OUTPUTS]
    linears = SharedInputLinears([LoRALinear(layer) for layer in layers])
    x, grads = sample(TOKENS)
    expected = run(theirs, x, grads)
    found = linears.forward(x, [None] * 3)
    sums = {}
    dx = linears.backward(grads, x, [low for _, low in found], [None] * 3, sums)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert_close([*(y for y, _ in found), dx, *as_returned(sums, trained)], expected)
    assert linears.backward(grads, x, [low for _, low in found], [None] * 3, {}, need_x=False) is None


@torch.no_grad()
def test_gradients_of_tiles_add_up():
    theirs, ours = both()
    linears = SharedInputLinears([getattr(ours.base_model.model, name).projection for name in OUTPUTS])
    x, grads = sample(TOKENS)
    expected, sums, dx = torch.enable_grad()(run)(theirs, x, grads), {}, []
    for rows in (slice(0, 20), slice(20, TOKENS)):
        lows = [low for _, low in linears.forward(x[rows], [None] * 3)]
        dx.append(linears.backward([grad[rows] for grad in grads], x[rows], lows, [None] * 3, sums))
    assert_close([torch.cat(dx), *as_returned(sums, linears.parameters)], expected[3:])
    assert (
        linears.backward(grads, x, [low for _, low in linears.forward(x, [None] * 3)], [None] * 3, {}, need_x=False)
        is None
    )


def test_another_or_a_changed_input_is_computed_anew(calls):
    theirs, ours = both()
    x, other = torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, INPUTS)
    layers, expected = ours.base_model.model, theirs.base_model.model
    layers.q_proj(x)
    assert_close([layers.k_proj(other)], [expected.k_proj(other)])
    layers.q_proj(x)
    x.mul_(2)
    assert_close([layers.v_proj(x)], [expected.v_proj(x)])
    x.mul_(2)
    assert_close(
        [layers.v_proj(x), layers.k_proj(x), layers.k_proj(x)], [expected.v_proj(x), *2 * [expected.k_proj(x)]]
    )
    assert calls == [3] * 6


def test_other_circumstances_are_computed_anew():
    theirs, ours = both()
    layers, expected, x = ours.base_model.model, theirs.base_model.model, torch.randn(TOKENS, INPUTS)
    with torch.no_grad():
        layers.q_proj(x)
    assert layers.k_proj(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        layers.q_proj(x)
    assert_close([layers.k_proj(x)], [expected.k_proj(x)])
    with torch.inference_mode():
        assert_close(ours(x.clone()), theirs(x))


def test_a_copy_of_a_model_computes_its_own():
    """Also where a call is left over, as after an error between two layers."""
    theirs, ours = both()
    x, grads = sample(TOKENS)
    ours.base_model.model.k_proj(x.requires_grad_())
    again = copy.deepcopy(ours)
    calls = [getattr(again.base_model.model, name).projection.calls for name in OUTPUTS]
    assert calls[0] is calls[1] is calls[2]
    assert calls[0] is not ours.base_model.model.q_proj.projection.calls
    assert_close(run(again, x, grads), run(theirs, x, grads))


def test_nothing_is_held():
    _, ours = both()
    x, grads = sample(TOKENS)
    outputs = ours(x)
    held = [weakref.ref(tensor) for tensor in (x, *outputs)]
    torch.autograd.backward(outputs, grads)
    del x, outputs
    gc.collect()
    assert [reference() for reference in held] == [None] * 4


def test_evaluation_and_a_disabled_adapter(calls):
    theirs, ours = both()
    x, _ = sample(TOKENS)
    assert_close(ours.eval()(x), theirs.eval()(x))
    with ours.train().disable_adapter(), theirs.disable_adapter():
        assert_close(ours(x), theirs(x))
    assert calls == []


def test_autocast():
    """Outputs in bf16, gradients as exact as PEFT's."""
    theirs, ours = both()
    x, grads = sample(2, TOKENS)
    exact = run(theirs, x, grads)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = (run(model, x, [grad.bfloat16() for grad in grads]) for model in (ours, theirs))
    assert all(y.dtype == torch.bfloat16 for y in found[:3])
    for one, other, truth in zip(found, plain, exact, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - truth).norm() < max(1.5 * (other.float() - truth).norm(), 0.004 * truth.norm())
