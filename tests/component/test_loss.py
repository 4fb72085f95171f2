"""The chunked loss against cross_entropy on full logits, and models that do not support it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
)

from component.adapter import add_adapter
from component.data import IGNORE_INDEX
from component.distributed.strategy import Strategy
from component.loss import ChunkedLoss, as_loss_head, next_token_loss, next_token_losses, use_chunked_loss
from component.train.trainer import LongQLoRATrainer
from tests.reference.plain_path import (
    SIZES,
    TOKENS,
    assert_same,
    random_batch,
    tiny_base,
    tiny_config,
    tiny_model,
    train_pass,
    under_plan,
)

HIDDEN, VOCABULARY = 24, 50


def problem(rows=2, tokens=37, *, bias=False, dtype=torch.float32, ignored=5):
    """Trainable hidden states and head, and labels, of which a quarter and the first ones are ignored."""
    hidden = torch.randn(rows, tokens, HIDDEN, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (rows, tokens))
    labels[:, :ignored] = IGNORE_INDEX
    if ignored:
        labels[torch.rand(rows, tokens) < 0.25] = IGNORE_INDEX
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias).to(dtype)
    as_loss_head(head)
    return hidden, labels, head


def plain_loss(hidden, labels, head, items=None):
    logits = head(hidden).float()[:, :-1].flatten(0, 1)
    target = labels[:, 1:].flatten()
    if items is None:
        return F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX)
    return F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum") / items


def chunked_loss(hidden, labels, *rest):
    return next_token_loss(hidden, F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX), *rest)


def with_gradients(function, hidden, labels, head, *rest, scale=1.0):
    leaves = [hidden, *head.parameters()]
    loss = function(hidden, labels, head, *rest)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss * scale, wanted)


def assert_close(ours, theirs, tolerance=1e-5):
    assert len(ours) == len(theirs)
    for found, expected in zip(ours, theirs, strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        largest = float(expected.abs().max())
        assert largest > 0
        assert float((found.double() - expected.double()).abs().max()) <= tolerance * largest


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 74, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_cross_entropy(chunk, bias):
    for shape in ((2, 37), (1, 2), (3, 5)):
        hidden, labels, head = problem(*shape, bias=bias, ignored=0)
        assert_close(
            with_gradients(chunked_loss, hidden, labels, head, None, chunk),
            with_gradients(plain_loss, hidden, labels, head),
        )
    hidden, labels, head = problem(bias=bias)
    for items in (None, 11, torch.tensor(200)):
        assert_close(
            with_gradients(chunked_loss, hidden, labels, head, items, chunk),
            with_gradients(plain_loss, hidden, labels, head, items),
        )


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_frozen_tensors_get_no_gradient(frozen):
    hidden, labels, head = problem(bias=True)
    if frozen == "head":
        head.requires_grad_(False)
    else:
        hidden = hidden.detach()
    assert_close(
        with_gradients(chunked_loss, hidden, labels, head, None, 7),
        with_gradients(plain_loss, hidden, labels, head),
    )
    with torch.no_grad():
        assert float(chunked_loss(hidden, labels, head, None, 7)) == pytest.approx(
            float(plain_loss(hidden, labels, head))
        )


@pytest.mark.parametrize("scale", [0.0, 0.125, 3.0, -1.0])
def test_gradients_are_scaled(scale):
    """backward gets a factor other than one: a loss scale, or a share of accumulated micro-batches."""
    hidden, labels, head = problem(bias=True)
    found = with_gradients(chunked_loss, hidden, labels, head, None, 7, scale=scale)
    expected = with_gradients(plain_loss, hidden, labels, head, scale=scale)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_rows_without_labels():
    """One such row changes nothing; without any label, the loss and all gradients are zero."""
    hidden, labels, head = problem()
    labels[0] = IGNORE_INDEX
    expected = with_gradients(plain_loss, hidden, labels, head)
    found = with_gradients(chunked_loss, hidden, labels, head, None, 7)
    assert_close(found, expected)
    assert not found[1][0].any()
    labels[:] = IGNORE_INDEX
    for items in (None, 9):
        loss, *gradients = with_gradients(chunked_loss, hidden, labels, head, items, 7)
        assert float(loss) == 0
        assert not any(gradient.any() for gradient in gradients)


def test_a_single_token_has_no_loss():
    hidden, labels, head = problem(1, 1, ignored=0)
    loss, *gradients = with_gradients(chunked_loss, hidden, labels, head, None, 7)
    assert float(loss) == 0
    assert not any(gradient.any() for gradient in gradients)


def test_the_last_hidden_state_and_the_first_label_are_unused():
    hidden, labels, head = problem(ignored=0)
    loss, gradient, _ = with_gradients(chunked_loss, hidden, labels, head, None, 7)
    assert not gradient[:, -1].any()
    assert gradient[:, :-1].any(dim=2).all()
    labels[:, 0] = IGNORE_INDEX
    assert torch.equal(chunked_loss(hidden, labels, head, None, 7), loss)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(dtype, tolerance):
    """Against fp32 on the same rounded inputs; chunks are summed in fp32, so their number does not matter."""
    hidden, labels, head = problem(2, 200, dtype=dtype, bias=True)
    exact = nn.Linear(HIDDEN, VOCABULARY)
    exact.load_state_dict(head.state_dict())
    expected = with_gradients(plain_loss, hidden.detach().float().requires_grad_(), labels, exact)
    for chunk in (3, 1000):
        found = with_gradients(chunked_loss, hidden, labels, head, None, chunk)
        assert found[0].dtype == torch.float32
        assert all(gradient.dtype == dtype for gradient in found[1:])
        assert_close([tensor.float() for tensor in found], expected, tolerance)


def test_the_heads_gradient_is_summed_in_fp32():
    """256 + 63 x 1 over 64 chunks of one token: in bf16 each 256 + 1 is 256."""
    hidden = torch.ones(64, 1, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        hidden[0] = 256.0
    head = nn.Linear(1, 2, bias=True, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)  # so that the gradient of each logit is -1/2 for the label, 1/2 for the other
    as_loss_head(head)
    total = next_token_loss(hidden[None], torch.zeros(1, 64, dtype=torch.long), head, 1, 1)
    weight, bias = torch.autograd.grad(total, [head.weight, head.bias])
    expected = torch.tensor([[-0.5], [0.5]]) * (256 + 63)
    assert torch.equal(weight, expected.bfloat16())
    assert torch.equal(bias, torch.tensor([-32.0, 32.0], dtype=torch.bfloat16))


def test_a_scaled_loss_does_not_underflow():
    """fp16's smallest number is 6e-8: dividing by 8192 labels too early would lose most of the gradient."""
    hidden, labels, head = problem(2, 40, dtype=torch.float16, ignored=0)
    with torch.no_grad():
        head.weight.mul_(1e-3)  # gradients of 1e-3 / 8192
    items, scale = 8192, 65536.0
    exact = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    exact.load_state_dict(head.state_dict())
    expected = with_gradients(plain_loss, hidden.detach().float().requires_grad_(), labels, exact, items, scale=scale)
    found = with_gradients(chunked_loss, hidden, labels, head, items, 7, scale=scale)
    assert_close([tensor.float() for tensor in found], expected, 1e-2)
    assert float(expected[1].abs().max()) / scale < 6e-8


def test_fp32_head_under_autocast():
    """A trained head is fp32, but hidden states are bf16."""
    hidden, labels, head = problem()
    expected = with_gradients(plain_loss, hidden, labels, head)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(chunked_loss, hidden.bfloat16().detach().requires_grad_(), labels, head, None, 7)
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.float32]
    assert_close([tensor.float() for tensor in found], expected, 3e-2)


def test_large_logits():
    """No overflow in exp."""
    hidden, labels, head = problem(ignored=0)
    hidden = (hidden * 1e4).detach().requires_grad_()
    found = with_gradients(chunked_loss, hidden, labels, head, None, 7)
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    assert_close(found, with_gradients(plain_loss, hidden, labels, head))


# ---- in a model


def test_no_logits_only_in_training_with_labels():
    lean = under_plan(tiny_model(), loss_chunk_tokens=11)
    batch = random_batch(2)
    assert lean.train()(**batch).logits is None
    assert lean(input_ids=batch["input_ids"]).logits is not None
    with torch.no_grad():
        assert lean(**batch).logits is not None
    evaluated = lean.eval()(**batch)
    assert evaluated.logits.shape == (*batch["input_ids"].shape, 96)
    assert lean.get_base_model().loss_chunk == 11


def test_chunk_size_limits_the_logits(monkeypatch):
    sizes = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: sizes.append((len(x), len(w))) or linear(x, w, b))
    hidden, labels, head = problem(2, 37)
    chunked_loss(hidden, labels, head, None, 11)
    assert sizes == [(11, VOCABULARY)] * 6 + [(8, VOCABULARY)]


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**{**SIZES, "pad_token_id": 0}, logit_scale=0.5),
        GraniteConfig(**{**SIZES, "pad_token_id": 0}, logits_scaling=3.0),
        Gemma2Config(**SIZES, final_logit_softcapping=5.0),
    ],
    ids=lambda config: config.model_type,
)
def test_scaled_and_capped_logits_are_unsupported(config):
    model = tiny_base(config)
    own = type(model)
    assert not use_chunked_loss(model, 7)
    assert type(model) is own


def test_a_model_keeps_its_class_name():
    """The Trainer reads from it whether to shift labels, and saved configs contain it."""
    model = tiny_base(tiny_config())
    assert use_chunked_loss(model, 7)
    assert isinstance(model, ChunkedLoss)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_label_smoothing_shifts_labels(tmp_path):
    """The Trainer computes this loss from logits, and shifts labels for class names it knows."""
    model = tiny_model()
    losses = []
    for trained in (model, under_plan(model)):
        arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none")
        trainer = LongQLoRATrainer(model=trained, args=arguments, extended_config=None, record={}, strategy=Strategy())
        losses.append(trainer.compute_loss(trained.train(), random_batch(2)).item())
        shifted = F.pad(random_batch(2)["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # as in the collator's batches
        again = trainer.compute_loss(trained.train(), {**random_batch(2), "shift_labels": shifted})
        assert again.item() == losses[-1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    ids = random_batch(2)["input_ids"][:, 5:]
    log_p = model(input_ids=random_batch(2)["input_ids"]).logits[:, 4:-1].log_softmax(-1)
    expected = -0.9 * log_p.gather(2, ids.unsqueeze(2)).mean() - 0.1 * log_p.mean()
    assert losses[1] == pytest.approx(float(expected), rel=1e-5)
    assert math.isfinite(losses[1])


def test_positional_arguments():
    """The second one is the mask, as in the model's own forward."""
    model = tiny_model(s2=False).get_base_model().train()
    lean = under_plan(tiny_model(s2=False)).get_base_model().train()
    batch = random_batch(2)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 30:], batch["labels"][1, 30:] = 0, -100
    mask[0, :20] = 0  # left padding: the loss shows whether the mask is used
    losses = [m(batch["input_ids"], mask, labels=batch["labels"]).loss.item() for m in (model, lean)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(model(**batch).loss.item(), rel=1e-4)


def test_embeddings_as_inputs():
    model = tiny_model()
    lean = under_plan(model, loss_chunk_tokens=11)
    batch = random_batch(2)
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    inputs = {**batch, "inputs_embeds": embedded}
    assert_same(train_pass(lean, inputs), train_pass(model, inputs))


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def full_logits_losses(model, ids: torch.Tensor) -> torch.Tensor:
    """(B, T - 1) from the full logits."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")


def adapted(model):
    """`model` with random LoRA, embeddings and norms."""
    model = add_adapter(model, rank=4, alpha=8, dropout=0.0, train_embedding=True, train_norm=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class TestNextTokenLosses:
    @pytest.mark.parametrize("chunk", [1, 3, 22, 23, 24, 1024])
    def test_equal_full_logits_for_any_chunk(self, chunk, tiny_llama):
        ids = torch.randint(0, 384, (2, 24))
        losses = next_token_losses(tiny_llama, ids, chunk)
        assert losses.shape == (2, 23)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, full_logits_losses(tiny_llama, ids))

    @pytest.mark.parametrize("chunk", [5, 1024])
    def test_equal_full_logits_through_an_adapter(self, chunk, tiny_llama):
        ids = torch.randint(0, 384, (2, 24))
        plain = full_logits_losses(tiny_llama, ids)
        model = adapted(tiny_llama)
        expected = full_logits_losses(model, ids)
        assert not torch.allclose(expected, plain, atol=1e-2), "the adapter changes the output"
        torch.testing.assert_close(next_token_losses(model, ids, chunk), expected)

    @pytest.mark.parametrize(
        ("build", "own"),
        [
            (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True)),
            (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=8)),
            (Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=8)),
            (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=8.0)),
            (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.1)),
            (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=1.0)),
        ],
        ids=["tied llama", "mistral with a sliding window", "qwen3", "granite", "cohere", "gemma2"],
    )
    def test_equal_full_logits_for_the_family(self, build, own):
        model = build(own).eval()
        ids = torch.randint(0, 64, (2, 24))
        torch.testing.assert_close(next_token_losses(model, ids, 7), full_logits_losses(model, ids))

    def test_half_precision_sums_in_fp32(self, tiny_llama):
        ids = torch.randint(0, 384, (1, 24))
        model = tiny_llama.to(torch.bfloat16)
        assert next_token_losses(model, ids).dtype == torch.float32


def test_losses_of_padded_rows():
    model = tiny_model(s2=False).eval()
    ids = random_batch(2)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    with torch.no_grad():
        logits = [model(input_ids=ids[:1]).logits, model(input_ids=ids[1:, :30]).logits]
    found = next_token_losses(model, ids, chunk=13, attention_mask=mask)
    assert found.shape == (2, TOKENS - 1)
    assert found.dtype == torch.float32
    assert float(found.mean()) > 0.5 * math.log(SIZES["vocab_size"])
    for row, (own, length) in enumerate(zip(logits, (TOKENS, 30), strict=True)):
        expected = F.cross_entropy(own[0, :-1], ids[row, 1:length], reduction="none")
        torch.testing.assert_close(found[row, : length - 1], expected, rtol=1e-5, atol=1e-5)
