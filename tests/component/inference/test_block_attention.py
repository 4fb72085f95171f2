"""How do new tokens attend to a long cache? As with stock SDPA over all keys and values."""

import pytest
import torch
from transformers import MistralConfig

from component.inference import quantized_layer
from component.inference.block_attention import NAME, block_attention_forward, supports_blocks
from component.inference.kv_cache import new_cache
from tests.conftest import build_llama

KINDS = ["dynamic", "int8", "fp8", "int4", "int2"]
CALLS = (128, 256, 100, 1, 1, 60, 1, 100, 53)  # tokens; full blocks, parts of one, several segments


@pytest.fixture
def model(tiny_llama_config, monkeypatch):
    monkeypatch.setattr(quantized_layer, "SEGMENT", 3)
    tiny_llama_config.max_position_embeddings = 1024

    def build(kv_heads: int):
        tiny_llama_config.num_key_value_heads = kv_heads
        return build_llama(tiny_llama_config).eval()

    return build


def logits(model, attention: str, kind: str, dtype=torch.float32) -> torch.Tensor:
    """Of 700 tokens, read in CALLS."""
    ids = torch.randint(5, 300, (1, sum(CALLS)), generator=torch.Generator().manual_seed(1))
    model.set_attn_implementation(attention)
    cache = new_cache(model.config, kind)
    with torch.no_grad():
        found = [model(part, past_key_values=cache).logits[0] for part in ids.split(CALLS, 1)]
    return torch.cat(found)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_equal_the_whole(kind, kv_heads, model):
    llama = model(kv_heads)
    expected = logits(llama, "sdpa", kind)
    # a sum rounded otherwise may round a number to the next code, mostly of fp8, whose steps are not equal
    torch.testing.assert_close(logits(llama, NAME, kind), expected, rtol=0, atol=1e-4 if kind == "dynamic" else 0.02)
    if kind != "dynamic":
        assert (expected - logits(llama, "sdpa", "dynamic")).abs().max() > 0.01, "the blocks were quantized"


def test_padding_is_masked(model):
    """As when several prompts are answered at once."""
    llama = model(2)
    ids, mask = torch.randint(5, 300, (2, 70)), torch.ones(2, 70, dtype=torch.long)
    mask[0, :20] = 0
    found = []
    for attention in ("sdpa", NAME):
        llama.set_attn_implementation(attention)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        found.append(llama.generate(ids, attention_mask=mask, **options))
    assert torch.equal(*found)


def test_which_models(tiny_llama_config):
    assert supports_blocks(tiny_llama_config, 10**6)
    tiny_llama_config.head_dim = 12
    assert not supports_blocks(tiny_llama_config, 10**6), "no fused kernel on a GPU"
    assert supports_blocks(MistralConfig(sliding_window=4096), 4096)
    assert not supports_blocks(MistralConfig(sliding_window=4096), 4097)


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_scale_is_that_of_the_head_size_unless_told(tokens, model):
    llama = model(2)
    heads, size = 4, 16
    llama.config._attn_implementation = NAME
    cache = new_cache(llama.config, "int8")
    past = torch.randn(2, 1, 2, 200, size)
    cache.update(*past, 0)
    query, new = torch.randn(1, heads, tokens, size), torch.randn(2, 1, 2, tokens, size)

    def attend(scaling: float | None) -> torch.Tensor:
        keys, values = cache.update(*new, 0)
        out = block_attention_forward(llama, query, keys, values, None, scaling=scaling)[0]
        cache.crop(-tokens)
        return out

    assert torch.equal(attend(None), attend(size**-0.5))
    assert not torch.allclose(attend(None), attend(1.0), atol=1e-3)
