"""Losses and gradients under a memory plan equal those of Hugging Face's layers and loss with PEFT's LoRA."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import CohereConfig, Gemma2Config, GemmaConfig, GraniteConfig, LlamaForCausalLM, PhiConfig

from component.attention import kernel
from component.attention.interface import use_shift_short_attention
from component.checkpoint import write_adapter
from component.distributed.strategy import Strategy
from component.loss import ChunkedLoss, next_token_losses
from component.memory import layer as layer_module
from component.memory.apply import use_memory_plan
from component.memory.layer import LeanLayer
from tests.reference.plain_path import (
    FAMILIES,
    GROUP,
    LAYERS,
    SIZES,
    TOKENS,
    assert_same,
    differs,
    plan_of,
    random_batch,
    tiny_base,
    tiny_config,
    tiny_model,
    tiny_nf4_model,
    train_pass,
    under_plan,
    with_lora,
)

ALL = {
    "keep_layers": 1,
    "keep_attention_layers": 1,
    "keep_attention_output": True,
    "offload_activations": True,
    "mlp_tile_tokens": 7,
    "loss_chunk_tokens": 11,
    "fetch_ahead": False,
}
PLANS = {
    "nothing": {},
    "everything": {"keep_layers": LAYERS},
    "attention": {"keep_attention_layers": LAYERS},
    "more than all layers": {"keep_layers": 99, "keep_attention_layers": 99},
    "nothing, everything": {"keep_layers": 1},
    "nothing, attention": {"keep_attention_layers": 2},
    "attention, everything": {"keep_layers": 1, "keep_attention_layers": 2},
    "attention output": {"keep_attention_output": True},
    "attention output, offloaded": {"keep_attention_output": True, "offload_activations": True},
    "offloaded": {"offload_activations": True},
    "offloaded, no prefetch": {"offload_activations": True, "fetch_ahead": False},
    "tiles of 7": {"mlp_tile_tokens": 7},
    "tiles of 17, attention": {"mlp_tile_tokens": 17, "keep_attention_layers": LAYERS},
    "tiles of 17, everything": {"mlp_tile_tokens": 17, "keep_layers": LAYERS},
    "tiles of 1": {"mlp_tile_tokens": 1},
    "tiles larger than the batch": {"mlp_tile_tokens": 1000},
    "chunks of 11": {"loss_chunk_tokens": 11},
    "chunks of 1": {"loss_chunk_tokens": 1},
    "all options": ALL,
    "all options, prefetch": {**ALL, "keep_layers": 0, "keep_attention_layers": 1, "fetch_ahead": True},
}
FEW = [PLANS["attention output, offloaded"], PLANS["attention, everything"], ALL]


def compare(model: PeftModel, *batches: dict, plans: list[dict] = FEW) -> list[PeftModel]:
    """Assert that copies of `model` under `plans` have the losses and gradients of `model`; the copies."""
    plain = train_pass(model, *batches)
    copies = [under_plan(model, **memory_options) for memory_options in plans]
    for lean in copies:
        assert_same(train_pass(lean, *batches), plain)
    return copies


@pytest.mark.parametrize("memory_options", PLANS.values(), ids=PLANS)
def test_each_memory_option_and_mixtures(memory_options):
    compare(tiny_model(), random_batch(2), plans=[memory_options])


@pytest.mark.parametrize("family", FAMILIES)
def test_full_attention_equals_that_of_transformers(family, monkeypatch):
    """With our kernels, whose output a recomputed layer can keep."""
    plain, config = tiny_model(family, s2=False), tiny_config(family, s2=False)
    use_shift_short_attention(config, None)
    ours, calls = with_lora(tiny_base(config)), []
    expected = train_pass(plain, random_batch(2))
    forward = kernel.attention_forward
    monkeypatch.setattr(kernel, "attention_forward", lambda *args, **how: calls.append(1) or forward(*args, **how))
    counts = []
    for memory_options in ({}, *FEW):
        calls.clear()
        assert_same(train_pass(under_plan(ours, **memory_options), random_batch(2)), expected)
        counts.append(len(calls))
    assert counts[0] == 2 * counts[1] > 0
    assert counts[1:] == [counts[1]] * len(FEW)


def test_each_layer_runs_at_its_level(monkeypatch):
    """Otherwise the other tests would compare the plain path with itself."""
    calls = []
    for name in ("_RecomputedLayer", "_MLP"):
        function = getattr(layer_module, name)
        apply = function.apply
        monkeypatch.setattr(function, "apply", lambda *args, n=name, f=apply: calls.append((n, args[3])) or f(*args))
    lean = under_plan(tiny_model(), **ALL)
    assert [layer.level for layer in lean.modules() if isinstance(layer, LeanLayer)] == [
        "nothing", "attention", "everything",
    ]  # fmt: skip
    train_pass(lean, random_batch())
    assert calls == [("_RecomputedLayer", 7), ("_MLP", False), ("_MLP", True)]
    offloader = lean.get_base_model().model.layers[0].offloader
    hidden, query = TOKENS * 64 * 4, TOKENS * 4 * 16 * 4  # bytes; parts are aligned to 256
    assert offloader.nbytes == sum(-(-size // 256) * 256 for size in (hidden, query))
    assert differs(train_pass(lean, random_batch(seed=9)), train_pass(lean, random_batch()))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_families(family):
    model = tiny_model(family)
    biases = {"mistral": 0, "qwen2": 3, "qwen3": 0}[family]
    assert sum(name.endswith("bias") for name, _ in model.named_parameters()) == biases * LAYERS
    compare(model, random_batch(2))


def test_biases_everywhere():
    compare(tiny_model(changes={"mlp_bias": True, "attention_bias": True}), random_batch())


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_head_counts(kv_heads):
    compare(tiny_model(changes={"num_key_value_heads": kv_heads}), random_batch())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_nf4_base(family, tmp_path):
    model = tiny_nf4_model(tmp_path, family)
    compare(model, random_batch(2))
    assert differs(train_pass(model, random_batch(2)), train_pass(tiny_model(family), random_batch(2)))


@pytest.mark.parametrize(
    "names",
    ["q_proj v_proj", "gate_proj up_proj down_proj", "down_proj", "o_proj up_proj", "q_proj lm_head", "1.mlp.up_proj"],
)
def test_subsets_of_targets(names):
    """Including lm_head, whose logits are then not one linear layer, and a target in a single layer."""
    model = tiny_model(target_names=names.split())
    for lean in compare(model, random_batch()):
        assert isinstance(lean.get_base_model(), ChunkedLoss) == ("lm_head" not in names)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_trained_embeddings_and_norms(tied, family):
    model = tiny_model(family, changes={"tie_word_embeddings": tied}, train_embedding=True, train_norm=True)
    compare(model, random_batch(2))


def test_norms_alone_and_frozen_tied_embeddings():
    compare(tiny_model("qwen3", train_norm=True), random_batch())
    compare(tiny_model(changes={"tie_word_embeddings": True}), random_batch())


@pytest.mark.parametrize("s2", [True, False], ids=["S2", "full"])
def test_padded_and_packed_rows(s2):
    padded = random_batch(2)
    padded["attention_mask"] = torch.ones(2, TOKENS, dtype=torch.long)
    padded["attention_mask"][1, 30:], padded["labels"][1, 30:] = 0, -100
    packed = random_batch()
    packed["position_ids"] = torch.cat([torch.arange(20), torch.arange(TOKENS - 20)])[None]
    model = tiny_model(s2=s2)
    compare(model, padded)
    compare(model, packed)
    packed["position_ids"] = torch.arange(TOKENS)[None]
    assert differs(train_pass(model, packed), train_pass(model, padded))


def test_packed_documents_do_not_attend_to_each_other():
    """The second document's loss does not depend on the first document, also when recomputed."""
    lean, losses = under_plan(tiny_model(), **ALL), []
    for seed in (1, 2):
        batch = random_batch()
        batch["input_ids"][:, :20] = random_batch(seed=seed)["input_ids"][:, :20]
        batch["labels"][:, :21] = -100
        batch["position_ids"] = torch.cat([torch.arange(20), torch.arange(TOKENS - 20)])[None]
        losses.append(train_pass(lean, batch)[0][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("s2", [True, False], ids=["S2", "full"])
def test_accumulation(s2):
    """The summed losses of micro-batches of different lengths are divided by the labels of all of them."""
    batches = [random_batch(1, 53, seed=1), random_batch(2, 31, seed=2), random_batch(1, 9, seed=5)]
    labels = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
    model = tiny_model(s2=s2)
    compare(model, *({**batch, "num_items_in_batch": labels} for batch in batches))
    assert differs(train_pass(model, *batches), train_pass(model, batches[0]))


@pytest.mark.parametrize("tokens", [2, GROUP // 2, GROUP, GROUP + 1])
def test_short_rows(tokens):
    batch = random_batch(2, tokens)
    batch["labels"] = batch["input_ids"].clone()
    model = tiny_model(target_names=["v_proj", "up_proj"])  # a single attended token: queries and keys get no gradient
    compare(model, batch)


def test_use_cache_in_training():
    """The default of the models' configs; a recomputed layer must not append each token twice."""
    for s2 in (True, False):
        compare(tiny_model(s2=s2, changes={"use_cache": True}), random_batch())


def test_two_passes_forward_then_two_backward():
    """Rejected with offloading, where the second forward pass reuses the buffers of the first."""
    first, second = random_batch(seed=1), random_batch(seed=2)
    lean = under_plan(tiny_model(), keep_attention_output=True).train()
    losses = [lean(**batch).loss for batch in (first, second)]
    for loss in losses:
        loss.backward()
    found = {name: p.grad.clone() for name, p in lean.named_parameters() if p.requires_grad}
    assert_same(([0.0], found), ([0.0], train_pass(tiny_model(), first, second)[1]))
    lean = under_plan(tiny_model(), offload_activations=True).train()
    loss = lean(**first).loss
    lean(**second)
    with pytest.raises(AssertionError, match="out of order"):
        loss.backward()


def errors(found: tuple, truth: tuple) -> list[float]:
    return [float((found[1][name].float() - g).norm() / g.norm()) for name, g in truth[1].items()]


BOTH = {"train_norm": True, "train_embedding": True}


@pytest.mark.parametrize(
    ("base", "trained"),
    [("fp32", {}), ("bf16", {}), ("bf16", {"train_norm": True}), ("bf16", BOTH), ("nf4", {}), ("nf4", BOTH)],
    ids=str,
)
def test_autocast(base, trained, tmp_path):
    """As in `python train.py` with bf16: as close to fp32 as the plain path."""
    dtype = torch.float32 if base == "fp32" else torch.bfloat16
    if base == "nf4":
        model = tiny_nf4_model(tmp_path, dtype=dtype, **trained)
        truth = tiny_nf4_model(tmp_path, **trained)
    else:
        model = with_lora(tiny_base(tiny_config()).to(dtype), **trained)
        truth = with_lora(tiny_base(tiny_config()).to(dtype).float(), **trained)
    expected = train_pass(truth, random_batch(2))
    with torch.autocast("cpu", torch.bfloat16):
        plain = train_pass(model, random_batch(2))
    assert any(error > 1e-3 for error in errors(plain, expected))
    for memory_options in FEW:
        with torch.autocast("cpu", torch.bfloat16):
            lean = train_pass(under_plan(model, **memory_options), random_batch(2))
        assert lean[0] == pytest.approx(expected[0], abs=2e-2)
        assert all(gradient.dtype == torch.float32 for gradient in lean[1].values())
        for ours, theirs in zip(errors(lean, expected), errors(plain, expected), strict=True):
            assert ours <= 1.5 * theirs + 2e-3


def test_a_base_in_half_precision_without_autocast():
    """As with ZeRO: everything is bf16, including gradients."""
    model = tiny_model(train_norm=True, train_embedding=True).to(torch.bfloat16)
    expected = train_pass(copy.deepcopy(model).float(), random_batch(2))
    plain = errors(train_pass(model, random_batch(2)), expected)
    for memory_options in FEW:
        lean = errors(train_pass(under_plan(model, **memory_options), random_batch(2)), expected)
        assert all(ours <= 1.3 * theirs + 2e-3 for ours, theirs in zip(lean, plain, strict=True))


# ---- evaluation and saving


def test_evaluation_and_generation_are_unchanged():
    model = tiny_model(dropout=0.3)
    lean = under_plan(model, **ALL)
    train_pass(lean, random_batch())
    batch = random_batch(2)
    with torch.no_grad():
        ours, theirs = lean.eval()(**batch), model.eval()(**batch)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(
        next_token_losses(lean, batch["input_ids"], chunk=7), next_token_losses(model, batch["input_ids"], chunk=7)
    )
    generated = [
        m.generate(input_ids=batch["input_ids"][:, :9], max_new_tokens=12, do_sample=False, use_cache=True)
        for m in (lean, model)
    ]
    assert torch.equal(*generated)
    assert generated[0].shape[1] > 9
    positional = lean.get_base_model().train()(batch["input_ids"], torch.ones_like(batch["input_ids"]))
    assert positional.loss is None  # the second argument is the mask
    assert positional.logits.shape == theirs.logits.shape


def test_adapter_can_be_saved_loaded_and_merged(tmp_path, tokenizer):
    model = tiny_model(train_embedding=True, train_norm=True)
    lean = under_plan(model, **ALL)
    for trained in (model, lean):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
        train_pass(trained, random_batch())
        optimizer.step()
    assert [name for name, _ in lean.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert lean.state_dict().keys() == model.state_dict().keys()
    folders = tmp_path / "ours", tmp_path / "theirs"
    for folder, trained in zip(folders, (lean, model), strict=True):
        write_adapter(folder, trained, tokenizer, tiny_config(s2=False))
    ids = random_batch(2)["input_ids"]
    logits = []
    for folder in folders:
        loaded = PeftModel.from_pretrained(tiny_base(tiny_config(s2=False)), folder).eval()
        logits.append(loaded(input_ids=ids).logits)
    before = with_lora(tiny_base(tiny_config(s2=False)), train_embedding=True, train_norm=True).eval()
    assert float((logits[0] - before(input_ids=ids).logits).detach().abs().max()) > 1e-2
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(lean.eval()(input_ids=ids).logits, logits[0], rtol=0, atol=1e-5)
    merged = lean.merge_and_unload().eval()
    torch.testing.assert_close(merged(input_ids=ids).logits, logits[0], rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "merged").config.architectures == ["LlamaForCausalLM"]


def test_copies_of_a_model_under_a_plan():
    """A deep copy trains the same, and shares neither weights nor the offloader."""
    batch = random_batch()
    lean = under_plan(tiny_model(), **ALL)
    expected = train_pass(lean, batch)
    other = copy.deepcopy(lean)
    with torch.no_grad():
        for parameter in lean.parameters():
            parameter.zero_()
    assert_same(train_pass(other, batch), expected)
    offloaders = [m.get_base_model().model.layers[0].offloader for m in (lean, other)]
    assert offloaders[0] is not offloaders[1]
    for _ in range(3):
        other(**batch)
    assert len(offloaders[1]._entries) == 1  # one of three layers is at level nothing


# ---- models without a plan


@pytest.mark.parametrize("config_class", [GemmaConfig, Gemma2Config, PhiConfig, CohereConfig, GraniteConfig])
def test_unsupported_layers_fall_back(config_class):
    """Their layers are unchanged, with the chunked loss if their logits are one linear layer; training is the same."""
    model = with_lora(tiny_base(config_class(**{**SIZES, "pad_token_id": 0})))
    lean = copy.deepcopy(model)
    reason = use_memory_plan(lean, plan_of(**ALL), fused=False)
    assert reason is not None
    assert type(model.get_base_model()).__name__ in reason
    assert isinstance(lean.get_base_model(), ChunkedLoss) == (config_class in (GemmaConfig, PhiConfig))
    batch = random_batch(2)
    assert_same(train_pass(lean, batch), train_pass(model, batch))
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"]).logits
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    torch.testing.assert_close(next_token_losses(lean.eval(), batch["input_ids"], chunk=7), expected)


def test_zero_3_gathers_whole_layers():
    model = tiny_model()
    assert use_memory_plan(model, plan_of(), fused=False, strategy=Strategy(zero_stage=3)) is None
    leaves = [module for module in model.modules() if getattr(module, "_z3_leaf", False)]
    assert leaves == list(model.get_base_model().model.layers)
    hidden = []
    model.get_base_model().model.layers[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert hidden[0].requires_grad  # else DeepSpeed would take the first layer's gradients before they are there


def test_zero_3_calls_the_modules_of_unsupported_layers():
    """A fused LoRA layer would read its base's weight, which ZeRO-3 gathers for a call of the base alone."""
    model = with_lora(tiny_base(GemmaConfig(**{**SIZES, "pad_token_id": 0})))
    classes = {type(module).__name__ for module in model.modules()}
    reason = use_memory_plan(model, plan_of(), fused=False, strategy=Strategy(zero_stage=3))
    assert reason is not None
    assert {type(module).__name__ for module in model.modules()} == classes
