"""Training with products in FP8: Hugging Face's layers with each factor rounded by itself are the reference."""

import copy
import json

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoTokenizer, Gemma2Config

from component.float8 import product
from component.float8.product import quantize_weight
from component.memory import linear
from component.train import model_check
from tests.reference.float8 import float8_card
from tests.reference.plain_path import (
    LAYERS,
    TOKENS,
    random_batch,
    tiny_model,
    tiny_nf4_model,
    train_pass,
    under_plan,
)
from tests.train_run import BASIC, TRAIN_TEXTS, Launcher, finish, losses, record

PLANS = {
    "nothing": {},
    "nothing, in tiles": {"mlp_tile_tokens": 17, "loss_chunk_tokens": 11},
    "attention output, offloaded": {"keep_attention_output": True, "offload_activations": True},
    "attention": {"keep_attention_layers": LAYERS},
    "everything": {"keep_layers": LAYERS},
    "mixed": {"keep_layers": 1, "keep_attention_layers": 1, "mlp_tile_tokens": 7, "loss_chunk_tokens": 32},
}
# A number next to the middle between two of FP8 may be rounded up here and down there. What follows differs by more,
# so that more is rounded otherwise: a reference with weights 1e-6 larger is up to 0.06 from itself, FP8's error 0.3.
FLIPS = 0.1


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each row to the nearest numbers of e4m3 after its largest is scaled to 448."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


class Rounded(torch.autograd.Function):
    """x W^T of rounded x and W, or of exact ones (None, W), with the gradient d W of rounded d and W."""

    @staticmethod
    def forward(ctx, x, forward_weight, backward_weight, exact):
        ctx.weight = backward_weight
        return rounded(x) @ forward_weight.t() if exact is None else x @ exact.t()

    @staticmethod
    def backward(ctx, grad):
        return rounded(grad) @ ctx.weight, None, None, None


def round_products(model: nn.Module, *, forward: bool = True) -> nn.Module:
    """A copy of `model` whose layers multiply by rounded frozen weights, if not `forward` in the backward pass alone.

    LoRA's own products and the head's are exact.
    """
    model = copy.deepcopy(model)
    for layer in model.get_base_model().get_decoder().modules():
        if isinstance(layer, nn.Linear) and not isinstance(layer, LoraLayer) and not layer.weight.requires_grad:
            exact = weight = layer.weight.detach()
            pair = (rounded(weight), rounded(weight.t()).t())
            if weight.shape != (layer.out_features, layer.in_features):  # NF4
                pair = tuple(quantize_weight(layer.weight, transposed=t).dequantized() for t in (False, True))
                pair, exact = (pair[0], pair[1].t()), bnb.functional.dequantize_4bit(weight, layer.weight.quant_state)
            given = (*pair, None if forward else exact)

            def of_rounded(x, given=given, bias=layer.bias):
                y = Rounded.apply(x, *given)
                return y if bias is None else y + bias

            layer.forward = of_rounded
    return model


def relative_errors(found: tuple, expected: tuple) -> list[float]:
    """Of the loss, and the norm of each gradient's error."""
    errors = [abs(found[0][0] / expected[0][0] - 1)]
    return errors + [float((found[1][n] - g).norm() / g.norm()) for n, g in expected[1].items()]


def assert_rounded(found: tuple, expected: tuple) -> None:
    assert found[1].keys() == expected[1].keys()
    assert max(relative_errors(found, expected)) < FLIPS


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_each_plan(plan):
    model, batch = tiny_model(), random_batch()
    expected = train_pass(round_products(model), batch)
    assert_rounded(train_pass(under_plan(model, in_float8=True, **plan), batch), expected)
    off = relative_errors(expected, train_pass(model, batch))
    assert sum(off) / len(off) > 2 * FLIPS, "rounding must be seen"


def test_all_products_with_frozen_weights_are_rounded(monkeypatch):
    """In a layer forward 7, again 6 at level `nothing` or 2 at level `attention`, and backward 7.

    The input of the first layer's q, k and v needs no gradient.
    """
    calls, multiply = [], linear.multiply
    monkeypatch.setattr(linear, "multiply", lambda *args: calls.append(1) or multiply(*args))
    products = []
    for plan in (PLANS["nothing"], PLANS["attention"], PLANS["everything"]):
        train_pass(under_plan(tiny_model(), in_float8=True, **plan), random_batch())
        products.append(len(calls))
        calls.clear()
        train_pass(under_plan(tiny_model(), in_float8=True, float8_forward=False, **plan), random_batch())
        assert len(calls) == LAYERS * 7 - 3
        calls.clear()
    assert products == [LAYERS * (7 + more + 7) - 3 for more in (6, 2, 0)]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {}),  # biases
        ("qwen3", {"train_norm": True}),
        ("mistral", {"train_embedding": True}),
        ("llama", {"target_names": ["q_proj", "v_proj", "up_proj"]}),  # frozen layers without LoRA
        ("llama", {"changes": {"num_key_value_heads": 1}}),
    ],
    ids=str,
)
@pytest.mark.parametrize("plan", [PLANS["nothing, in tiles"], PLANS["everything"]], ids=["nothing", "everything"])
def test_models(family, options, plan):
    model, batch = tiny_model(family, **options), random_batch(2)
    expected = train_pass(round_products(model), batch)
    assert_rounded(train_pass(under_plan(model, in_float8=True, **plan), batch), expected)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_nf4(plan, tmp_path):
    model, batch = tiny_nf4_model(tmp_path, "qwen2"), random_batch()
    expected = train_pass(round_products(model), batch)
    assert_rounded(train_pass(under_plan(model, in_float8=True, **plan), batch), expected)


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_gradients_of_activations_alone(plan, kind, tmp_path):
    """The loss is exact, and so is what the last layer's MLP sees; errors are a fraction of those of all products."""
    model = tiny_model() if kind == "fp32" else tiny_nf4_model(tmp_path, "qwen2")
    batch = random_batch()
    exact = train_pass(model, batch)
    expected = train_pass(round_products(model, forward=False), batch)
    found = train_pass(under_plan(model, in_float8=True, float8_forward=False, **plan), batch)
    assert_rounded(found, expected)
    assert found[0][0] == pytest.approx(exact[0][0], rel=1e-5)
    of_all = relative_errors(train_pass(under_plan(model, in_float8=True, **plan), batch), exact)
    own = relative_errors(found, exact)
    assert 0.05 < sum(own[1:]) / sum(of_all[1:]) < 0.7


def test_errors_of_a_model_are_those_of_its_products():
    """One product errs by 2^-4 sqrt(2 / 3) at most, and n in a row by sqrt(n) as much if each passes errors on.

    A random model amplifies them, less than twice.
    """
    model, batch = tiny_model(), random_batch(2)
    errors = relative_errors(train_pass(under_plan(model, in_float8=True), batch), train_pass(model, batch))
    in_a_row = LAYERS * 4 * 2  # q or k, o, up, down, and back
    assert 0 < errors[0] < 0.02
    assert 0.05 < max(errors[1:]) < 2 * 2**-4 * (2 / 3 * in_a_row) ** 0.5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_give_the_same(dropout):
    model, batch = tiny_model(dropout=dropout), random_batch(2)
    kept = train_pass(under_plan(model, in_float8=True, keep_layers=LAYERS), batch)
    assert_rounded(train_pass(under_plan(model, in_float8=True), batch), kept)


def test_padding_changes_nothing():
    """Neither that of rows to a multiple of 16 tokens, nor that of a batch."""
    model, batch = under_plan(tiny_model(), in_float8=True), random_batch()
    longer = {name: F.pad(t, (0, 11), value=-100 if name == "labels" else 3) for name, t in batch.items()}
    longer["attention_mask"] = (torch.arange(TOKENS + 11) < TOKENS).long()[None]
    assert_rounded(train_pass(model, longer), train_pass(model, batch))


def test_evaluation_is_not_rounded():
    model = tiny_model()
    lean, batch = under_plan(model, in_float8=True).eval(), random_batch()
    torch.testing.assert_close(lean(**batch).logits, model.eval()(**batch).logits)


# ---- train.py


def test_train_py_rounds_weights_in_each_step_in_its_own_way(base_folder, tmp_path):
    """The same row in every step, and nothing is learnt: in the training precision all losses are equal.

    A run that resumes after the second step rounds as the unbroken one did.
    """
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"text": TRAIN_TEXTS[0]}) + "\n")
    found, train = {}, Launcher(tmp_path)
    values = BASIC | {"model_name_or_path": str(base_folder), "train_file": str(data), "learning_rate": 1e-12}
    values |= {"gradient_accumulation_steps": 1, "max_steps": 4, "save_steps": 2}
    for kind in ("unquantized", "fp8"):
        finish(train(values | {"frozen_matmul": kind, "output_dir": str(tmp_path / kind)}))
        found[kind] = losses(tmp_path / kind)
    assert len(set(found["unquantized"].values())) == 1
    assert len(set(found["fp8"].values())) == 4, "each step rounds in its own way"
    mean = sum(found["fp8"].values()) / 4
    assert mean == pytest.approx(found["unquantized"][1], rel=0.01)
    again = {"frozen_matmul": "fp8", "output_dir": str(tmp_path / "fp8")}
    again |= {"resume_from_checkpoint": str(tmp_path / "fp8/checkpoint-2")}
    finish(train(values | again))
    assert losses(tmp_path / "fp8") == found["fp8"]


def say_that_fp8_is_fast() -> None:
    model_check.is_fast = lambda hidden, device: True


def test_auto_is_decided_by_the_gpu(base_folder, tmp_path):
    """Here by what this process is told of it."""
    data, train = tmp_path / "train.jsonl", Launcher(tmp_path)
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TRAIN_TEXTS))
    values = BASIC | {"model_name_or_path": str(base_folder), "train_file": str(data), "bf16": True}
    for name, sabotage in (("unquantized", None), ("fp8_backward", say_that_fp8_is_fast)):
        output = finish(train(values | {"output_dir": str(tmp_path / name)}, sabotage))
        assert ("gradients of activations in FP8 (e4m3, simulated in fp32)" in output) == (name == "fp8_backward")
        assert record(tmp_path / name)["arguments"]["frozen_matmul"] == name


def test_train_py(base_folder, tmp_path):
    """Losses near those in the training precision, a summary that says so, a record, and the same adapter folder."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TRAIN_TEXTS))
    found, train = {}, Launcher(tmp_path)
    for kind in ("unquantized", "fp8"):
        folder = tmp_path / kind
        values = BASIC | {"model_name_or_path": str(base_folder), "train_file": str(data), "output_dir": str(folder)}
        output = finish(train(values | {"frozen_matmul": kind}))
        assert ("products with frozen weights in FP8 (e4m3, simulated in fp32)" in output) == (kind == "fp8")
        assert record(folder)["arguments"]["frozen_matmul"] == kind
        found[kind] = list(losses(folder).values())
    assert len(found["fp8"]) == 3
    assert found["fp8"] == pytest.approx(found["unquantized"], rel=0.02)
    assert found["fp8"][0] != found["unquantized"][0]
    left = [sorted(path.name for path in (tmp_path / kind).iterdir()) for kind in found]
    assert left[0] == left[1]


def test_train_py_refuses_layers_without_a_plan(base_folder, tmp_path):
    """Before weights are looked for: this folder has none."""
    config = Gemma2Config(hidden_size=64, intermediate_size=112, num_hidden_layers=2, vocab_size=96)
    config.save_pretrained(tmp_path / "gemma2")
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tmp_path / "gemma2")
    values = BASIC | {"model_name_or_path": str(tmp_path / "gemma2"), "train_file": "x.jsonl", "frozen_matmul": "fp8"}
    values |= {"output_dir": str(tmp_path / "out"), "model_max_length": 8192, "use_shift_short_attention": False}
    run = Launcher(tmp_path)(values)
    assert run.returncode == 1
    assert "frozen_matmul: fp8, but memory plans" in run.stdout


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_kernels_err_as_plain_operations_do(family, plan, tmp_path, monkeypatch):
    """bf16 on an NF4 base, with Triton and torch._scaled_mm, and with the same numbers multiplied in fp32.

    Rounding to bf16 alone makes the two differ by 0.16 on average, as many numbers are rounded to other ones of FP8.
    """
    device = float8_card()
    model = tiny_nf4_model(tmp_path, family, torch.bfloat16).to(device)
    batch = {name: tensor.to(device) for name, tensor in random_batch(2).items()}
    lean = under_plan(model, in_float8=True, **plan)
    with torch.autocast("cuda", torch.bfloat16):
        found = train_pass(lean, batch)
        unrounded = train_pass(under_plan(model, **plan), batch)
        monkeypatch.setattr(product, "_has_float8", lambda _: False)
        expected = train_pass(lean, batch)
    errors, plain = relative_errors(found, unrounded), relative_errors(expected, unrounded)
    assert 0.5 < sum(errors) / sum(plain) < 1.3
    assert errors[0] < 0.02


def test_queries_keys_and_values_share_a_quantized_input(monkeypatch):
    """Quantized in a layer: the inputs of q, of o, of gate, and of down; backward 7 gradients but those of 3."""
    inputs = []
    quantize = product.quantize
    for module in (linear, product):
        monkeypatch.setattr(module, "quantize", lambda x, **options: inputs.append(x.shape) or quantize(x, **options))
    model = under_plan(tiny_model(), in_float8=True, **PLANS["everything"])
    train_pass(model, random_batch())
    of_tokens = [shape for shape in inputs if shape[0] == TOKENS]  # the others are weights
    assert len(of_tokens) == LAYERS * (4 + 7) - 3
    calls = model.get_base_model().get_decoder().layers[0].self_attn.q_proj.projection.calls
    assert not calls._outputs, "nothing is held between steps"
