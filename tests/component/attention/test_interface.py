"""Shift short attention in a model: selected through transformers, against stock attention, and by its Jacobian.

Shapes: B batch, T tokens.
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from component.attention import interface
from component.attention.interface import has_plain_attention, use_shift_short_attention
from component.attention.segment import SavedAttention
from component.error import UserError
from tests.reference.attention import positions
from tests.reference.shift_short import LOOP, ROLLED, seen

# In a model


def build_model(config, attention_name: str, group_size: int = 8, weights: dict | None = None):
    """A model of `config` with the attention of that name; ours is selected as train.py does."""
    config = copy.deepcopy(config)
    if attention_name == interface.NAME:
        use_shift_short_attention(config, group_size)
    else:
        config.group_size = group_size
        config._attn_implementation = attention_name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    if weights is not None:
        model.load_state_dict(weights)
    assert model.config._attn_implementation == attention_name
    return model


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 384, (rows, length), generator=torch.Generator().manual_seed(seed))


def jacobian(model, length: int) -> Tensor:
    """(T, T): magnitude of d last hidden state of the row's token / d embedding of the column's token."""
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(1, length, model.config.hidden_size, generator=generator, requires_grad=True)
    output = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    weighted = (output * torch.randn(output.shape, generator=generator)).sum(-1)[0]
    rows = [torch.autograd.grad(token, embeddings, retain_graph=True)[0][0].abs().sum(-1) for token in weighted]
    return torch.stack(rows)


@pytest.fixture
def deep_config(tiny_llama_config) -> LlamaConfig:
    tiny_llama_config.num_hidden_layers = 16
    return tiny_llama_config


@pytest.mark.parametrize(("kv_heads", "length"), [(4, 32), (2, 32), (2, 29), (1, 29)])
def test_no_information_about_later_tokens_in_16_layers(deep_config, kv_heads, length):
    deep_config.num_key_value_heads = kv_heads
    reach = jacobian(build_model(deep_config, interface.NAME, group_size=8).train(), length)
    assert (reach.triu(1) == 0).all()
    assert (reach.diagonal() > 0).all()
    assert reach[-1, 0] > 0  # groups overlap, so information from the first token reaches the last


def test_the_original_roll_leaks_later_tokens(deep_config):
    reach = jacobian(build_model(deep_config, ROLLED, group_size=8).train(), 32)
    assert (reach.triu(1) != 0).any()
    assert (reach.diagonal(1) > 0).all()  # including the next token, the training target


def test_one_layer_of_the_original_roll_does_not_leak_the_next_token(deep_config):
    deep_config.num_hidden_layers = 1
    reach = jacobian(build_model(deep_config, ROLLED, group_size=8).train(), 32)
    assert (reach[:4, -4:] > 0).all()  # the first half-group attends to the last
    assert (reach.diagonal(1) == 0).all()


def test_one_layer_attends_to_its_group_only(tiny_llama_config):
    tiny_llama_config.num_hidden_layers = 1
    reach = jacobian(build_model(tiny_llama_config, interface.NAME, group_size=8).train(), 27)
    expected = seen(27, (0,), 8, shifted=False) | seen(27, (0,), 8, shifted=True)
    assert torch.equal(reach > 0, expected)


def logits_and_gradients(model, loss_mask: Tensor | None = None, **inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of all parameters; tokens outside `loss_mask` (B, T) have no loss."""
    model.zero_grad()
    logits = model(**{"use_cache": False, **inputs}).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)) / logits.shape[1]
    if loss_mask is not None:
        weight = weight * loss_mask[..., None]
    (logits * weight).sum().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(ours, theirs, where: Tensor | None = None):
    logits, other_logits = (ours[0], theirs[0]) if where is None else (ours[0][where], theirs[0][where])
    assert_close(logits, other_logits, atol=1e-4, rtol=1e-4)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        assert_close(gradient, theirs[1][name], atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# transformers 5.23 renames gradient checkpointing; the old name works in all supported versions
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])


def twins(config, checkpointing: dict | None, group_size: int = 8):
    """Our model and the loop reference, with the same weights, in training mode; only ours uses checkpointing."""
    ours = build_model(config, interface.NAME, group_size).train()
    loop = build_model(config, LOOP, group_size, ours.state_dict()).train()
    if checkpointing is not None:
        ours.gradient_checkpointing_enable(checkpointing)
        ours.enable_input_require_grads()  # as PEFT does; needed by the reentrant variant
    return ours, loop


@CHECKPOINTING
@pytest.mark.parametrize("length", [3, 8, 27, 40])
def test_trained_model_equals_loop(tiny_llama_config, checkpointing, length):
    ours, loop = twins(tiny_llama_config, checkpointing)
    inputs, calls = {"input_ids": token_ids(2, length)}, []
    ours.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert_same(logits_and_gradients(ours, **inputs), logits_and_gradients(loop, **inputs))
    assert len(calls) == (1 if checkpointing is None else 2)  # recomputed once


@CHECKPOINTING
@pytest.mark.parametrize("use_cache", [False, None])
def test_trained_model_with_right_padding_equals_loop(tiny_llama_config, checkpointing, use_cache):
    ours, loop = twins(tiny_llama_config, checkpointing)
    mask = torch.ones(3, 27, dtype=torch.long)
    mask[0, 26:], mask[1, 5:] = 0, 0
    inputs = {"input_ids": token_ids(3, 27), "attention_mask": mask, "use_cache": use_cache}
    result = logits_and_gradients(ours, loss_mask=mask, **inputs)
    assert_same(result, logits_and_gradients(loop, loss_mask=mask, **inputs), where=mask.bool())

    other_pads = {**inputs, "input_ids": torch.where(mask.bool(), inputs["input_ids"], token_ids(3, 27, seed=9))}
    assert_same(result, logits_and_gradients(ours, loss_mask=mask, **other_pads), where=mask.bool())
    alone = ours(input_ids=inputs["input_ids"][1:2, :5], use_cache=False).logits
    assert_close(result[0][1:2, :5], alone.detach(), atol=1e-4, rtol=1e-4)


PACKED = [[5, 1, 21], [13, 14], [27]]


@CHECKPOINTING
@pytest.mark.parametrize("attention_mask", [None, torch.ones(3, 27, dtype=torch.long)])
@pytest.mark.parametrize("use_cache", [False, None])  # None: the config's value, True by default
def test_trained_model_keeps_packed_documents_apart(tiny_llama_config, checkpointing, attention_mask, use_cache):
    ours, loop = twins(tiny_llama_config, checkpointing)
    inputs = {"input_ids": token_ids(3, 27), "position_ids": positions(*PACKED)}
    loop_result = logits_and_gradients(loop, **inputs)
    result = logits_and_gradients(ours, **inputs, attention_mask=attention_mask, use_cache=use_cache)
    assert_same(result, loop_result)

    for row, lengths in enumerate(PACKED):
        start = 0
        for length in lengths:
            document = slice(start, start + length)
            alone = ours(input_ids=inputs["input_ids"][row : row + 1, document], use_cache=False).logits.detach()
            assert_close(result[0][row : row + 1, document], alone, atol=1e-4, rtol=1e-4)
            start += length


def test_packed_documents_train_like_separate_ones(tiny_llama_config):
    """The gradients of a packed row are the sum of its documents' gradients."""
    model, ids, lengths = build_model(tiny_llama_config, interface.NAME).train(), token_ids(1, 27), [5, 1, 21]
    weight = torch.randn(1, 27, 384)

    def gradients(pairs):
        model.zero_grad()
        for inputs, its_weight in pairs:
            (model(**inputs, use_cache=False).logits * its_weight).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    packed = gradients([({"input_ids": ids, "position_ids": positions(lengths)}, weight)])
    alone = gradients(
        [
            ({"input_ids": part}, its_weight)
            for part, its_weight in zip(ids.split(lengths, 1), weight.split(lengths, 1), strict=True)
        ]
    )
    for mine, theirs in zip(packed, alone, strict=True):
        assert_close(mine, theirs, atol=1e-3, rtol=1e-4)


def test_one_row_of_positions_applies_to_the_batch(tiny_llama_config):
    ours, loop = twins(tiny_llama_config, None)
    inputs = {"input_ids": token_ids(3, 27), "position_ids": positions([13, 14])}
    result = logits_and_gradients(ours, **inputs)
    assert_same(result, logits_and_gradients(loop, **inputs))
    alone = ours(input_ids=inputs["input_ids"][:, 13:], use_cache=False).logits.detach()
    assert_close(result[0][:, 13:], alone, atol=1e-4, rtol=1e-4)


def test_packed_documents_with_right_padding(tiny_llama_config):
    ours, loop = twins(tiny_llama_config, None)
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[:, 27:] = 0
    # padding can have any positions: zeros here
    inputs = {"input_ids": token_ids(3, 30), "position_ids": F.pad(positions(*PACKED), (0, 3))}
    result = logits_and_gradients(ours, loss_mask=mask, attention_mask=mask, **inputs)
    assert_same(result, logits_and_gradients(loop, loss_mask=mask, **inputs), where=mask.bool())


@pytest.mark.parametrize(
    "mask", [[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0]]
)
@pytest.mark.parametrize("use_cache", [False, None])
@CHECKPOINTING
def test_left_padding_and_holes_are_rejected_in_training(tiny_llama_config, mask, use_cache, checkpointing):
    ours, _ = twins(tiny_llama_config, checkpointing)
    masks = torch.tensor([[1] * 6, mask])  # one bad row is enough
    with pytest.raises(UserError, match=r"attention_mask.*right"):
        ours(input_ids=token_ids(2, 6), attention_mask=masks, use_cache=use_cache)


def test_4d_masks_are_rejected_in_training(tiny_llama_config):
    model = build_model(tiny_llama_config, interface.NAME).train()
    with pytest.raises(UserError, match="attention_mask"):
        model(input_ids=token_ids(1, 6), attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool).tril())


def test_attention_dropout_acts_in_training_only(tiny_llama_config):
    inputs = {"input_ids": token_ids(1, 27), "use_cache": False}
    without = build_model(tiny_llama_config, interface.NAME)
    tiny_llama_config.attention_dropout = 0.5
    model = build_model(tiny_llama_config, interface.NAME, weights=without.state_dict())
    stock = build_model(tiny_llama_config, "sdpa", weights=without.state_dict())
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(**inputs).logits, stock.eval()(**inputs).logits)
        model.train()
        assert not torch.allclose(model(**inputs).logits, model(**inputs).logits, atol=1e-3)
        without.train()
        assert torch.equal(without(**inputs).logits, without(**inputs).logits)
        # the first token attends only to itself: its weight of 1 is dropped, or doubled
        first = torch.stack([model(**inputs).logits[0, 0] for _ in range(40)])
        assert len(first.unique(dim=0)) > 1


def test_a_decoder_layer_passes_saved_attention_on(tiny_llama_config, kernel_calls):
    model = build_model(tiny_llama_config, interface.NAME).model.train()
    layer, hidden = model.layers[0], torch.randn(2, 27, model.config.hidden_size, requires_grad=True)
    position_ids = positions(*PACKED[:2])
    options = {
        "attention_mask": interface.TrainingMask(None, lambda: None),
        "position_ids": position_ids,
        "position_embeddings": model.rotary_emb(hidden, position_ids),
    }

    def run(**more):
        layer.zero_grad()
        output = layer(hidden, **options, **more)
        output.square().sum().backward()
        return [output.detach(), *(parameter.grad.clone() for parameter in layer.parameters())]

    expected, saved = run(), SavedAttention()
    with torch.no_grad():
        layer(hidden, **options, saved_attention=saved)
    assert saved.out.shape[:2] == (2, 27)
    kernel_calls.clear()
    again = run(saved_attention=saved)
    assert not kernel_calls
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, expected, strict=True))


# Outside training: stock attention


@pytest.fixture
def stock_and_ours(tiny_llama_config):
    stock = build_model(tiny_llama_config, "sdpa").eval()
    return stock, build_model(tiny_llama_config, interface.NAME, weights=stock.state_dict()).eval()


LEFT_PADDED = torch.tensor([[0] * 4 + [1] * 23, [1] * 27, [0] * 26 + [1]])
WITH_HOLES = torch.ones(3, 27, dtype=torch.long).index_fill(1, torch.tensor([3, 11]), 0)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"attention_mask": torch.ones(3, 27, dtype=torch.long)},
        {"attention_mask": LEFT_PADDED},
        {"attention_mask": LEFT_PADDED.flip(1)},
        {"attention_mask": WITH_HOLES},
        {"attention_mask": torch.ones(3, 1, 27, 27, dtype=torch.bool).tril().triu(-5)},
        {"position_ids": positions(*PACKED)},
        {"position_ids": positions([13, 14])},
        {"position_ids": positions(*PACKED), "attention_mask": torch.ones(3, 27, dtype=torch.long)},
    ],
    ids=["none", "ones", "left", "right", "holes", "4d", "packed", "packed-1-row", "packed-ones"],
)
def test_evaluation_is_stock_full_attention(stock_and_ours, inputs, use_cache):
    stock, ours = stock_and_ours
    inputs = {"input_ids": token_ids(3, 27), "use_cache": use_cache, **inputs}
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


def test_training_is_not_full_attention(stock_and_ours):
    _, ours = stock_and_ours
    inputs = {"input_ids": token_ids(3, 27), "use_cache": False}
    with torch.no_grad():
        full, short = ours(**inputs).logits, ours.train()(**inputs).logits
        assert torch.equal(ours.eval()(**inputs).logits, full)  # and back
    # tokens before g/2 = 4 attend to the same; from g = 8 on, one half of the heads attends to fewer tokens
    assert_close(short[:, :4], full[:, :4], atol=1e-5, rtol=1e-5)
    assert ((short[:, 8:] - full[:, 8:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize(
    "inputs",
    [
        {"attention_mask": torch.ones(3, 27, dtype=torch.long)},
        {"attention_mask": LEFT_PADDED},
        {"attention_mask": torch.ones(3, 27, dtype=torch.long), "position_ids": positions(*PACKED)},
    ],
    ids=["ones", "left", "packed"],
)
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("new_tokens", [1, 9])  # 1: a static cache is as long as the prompt
def test_generation_is_stock(stock_and_ours, inputs, cache, new_tokens):
    options = {
        "input_ids": token_ids(3, 27),
        **inputs,
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
        **({"cache_implementation": cache} if cache else {"use_cache": False}),
    }
    stock, ours = (model.generate(**options) for model in stock_and_ours)
    assert ours.sequences.shape == (3, 27 + new_tokens)
    assert torch.equal(ours.sequences, stock.sequences)
    for mine, theirs in zip(ours.logits, stock.logits, strict=True):
        assert torch.equal(mine, theirs)


def test_backward_in_evaluation_is_stock(stock_and_ours):
    stock, ours = (logits_and_gradients(model, input_ids=token_ids(2, 27)) for model in stock_and_ours)
    assert torch.equal(ours[0], stock[0])
    assert all(torch.equal(gradient, stock[1][name]) for name, gradient in ours[1].items())


# Selected through the config


def test_selection_works_with_from_pretrained(base_folder):
    config = AutoConfig.from_pretrained(base_folder)
    use_shift_short_attention(config, 8)
    ours = AutoModelForCausalLM.from_pretrained(base_folder, config=config)
    stock = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="sdpa")
    loop = build_model(AutoConfig.from_pretrained(base_folder), LOOP, 8, stock.state_dict()).train()
    assert ours.config._attn_implementation == "shift_short"
    ids = token_ids(1, 27)
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, stock.eval()(ids).logits)
        assert_close(ours.train()(ids).logits, loop(ids).logits, atol=1e-4, rtol=1e-4)


def test_saved_model_is_stock(tmp_path, tiny_llama_config):
    """A saved folder does not name our attention."""
    ours = build_model(tiny_llama_config, interface.NAME).eval()
    ours.save_pretrained(tmp_path)
    assert "shift_short" not in json.dumps([json.loads(file.read_text()) for file in tmp_path.glob("*.json")])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(loaded(token_ids(1, 27)).logits, ours(token_ids(1, 27)).logits)


TINY = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def test_sliding_window_shorter_than_the_group_is_rejected():
    config = MistralConfig(**TINY, sliding_window=10)
    with pytest.raises(UserError, match=r"group_size.*12.*10"):
        use_shift_short_attention(config, 12)
    assert config._attn_implementation != "shift_short"
    use_shift_short_attention(config, 10)
    use_shift_short_attention(MistralConfig(**TINY, sliding_window=None), 12)
    use_shift_short_attention(Qwen2Config(**TINY, sliding_window=10, use_sliding_window=False), 12)
    with pytest.raises(UserError, match="group_size"):
        use_shift_short_attention(Qwen2Config(**TINY, sliding_window=10, use_sliding_window=True), 12)


def test_full_attention_beyond_the_sliding_window_is_rejected():
    with pytest.raises(UserError, match=r"full_attention_ratio.*11 tokens.*window is 10"):
        use_shift_short_attention(MistralConfig(**TINY, sliding_window=10), 4, 11)
    use_shift_short_attention(MistralConfig(**TINY, sliding_window=10), 4, 10)
    use_shift_short_attention(MistralConfig(**TINY, sliding_window=None), 4, 11)
    use_shift_short_attention(Qwen2Config(**TINY, sliding_window=10, use_sliding_window=False), 4, 11)
    with pytest.raises(UserError, match=r"packing.*11 tokens.*window is 10"):
        use_shift_short_attention(MistralConfig(**TINY, sliding_window=10), None, 11)
    use_shift_short_attention(MistralConfig(**TINY, sliding_window=10), None, 10)


@pytest.mark.parametrize(
    ("config", "is_plain"),  # over rows of 10 and of 11 tokens
    [
        (LlamaConfig(**TINY), (True, True)),
        (Qwen3Config(**TINY), (True, True)),
        (MistralConfig(**TINY, sliding_window=None), (True, True)),
        (MistralConfig(**TINY, sliding_window=10), (True, False)),
        (Qwen2Config(**TINY, sliding_window=10, use_sliding_window=True, max_window_layers=1), (True, False)),
        (Qwen2Config(**TINY, sliding_window=10, use_sliding_window=False), (True, True)),
        (Gemma2Config(**TINY), (False, False)),  # softcapping
        (GptOssConfig(**TINY), (False, False)),  # sinks
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else None,
)
def test_plain_attention(config, is_plain):
    assert (has_plain_attention(config, 10), has_plain_attention(config, 11)) == is_plain


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**TINY, sliding_window=10),
        Qwen2Config(**TINY, sliding_window=10, use_sliding_window=True, max_window_layers=1),
    ],
    ids=["mistral", "qwen2"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_models_with_a_longer_sliding_window(config, packed):
    ours, loop = twins(config, None)
    inputs = {"input_ids": token_ids(3, 27), **({"position_ids": positions(*PACKED)} if packed else {})}
    assert_same(logits_and_gradients(ours, **inputs), logits_and_gradients(loop, **inputs))
    stock = build_model(config, "sdpa", weights=ours.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(ours.eval()(**inputs).logits, stock(**inputs).logits)
