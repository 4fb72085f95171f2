"""KV caches on a GPU: logits beside those of the 16-bit cache, memory beside the estimate."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from component.inference.block_attention import NAME
from component.inference.cache_memory import Reading, cache_bytes, need
from component.inference.flags import CACHES
from component.inference.generate import prefill
from component.inference.kv_cache import PromptCache, tensor_bytes
from component.loading import free_memory

pytestmark = pytest.mark.gpu
TOKENS, CHUNK, DECODED = 20_000, 2048, 8
WORST = {"dynamic": 0.01, "offloaded": 0.01, "int8": 0.03, "fp8": 0.15, "int4": 0.3, "int2": 1.2}  # of a deviation


@pytest.fixture(scope="module", params=[8, 2], ids=["8 key/value heads", "2 key/value heads"])
def model(request):
    """Heads of 128 numbers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=request.param,
        max_position_embeddings=32768,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config).to("cuda", torch.float16).eval()


@torch.no_grad()
def read(model, kind: str, attention: str) -> tuple[torch.Tensor, PromptCache]:
    """Logits of the last tokens, decoded one by one, in fp32."""
    model.set_attn_implementation(attention)
    ids = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(1)).cuda()
    cache, first = PromptCache(model.config, kind, CHUNK), TOKENS - DECODED
    past = cache.start(ids[0].tolist())
    prefill(model, ids[:, :first], past, CHUNK)
    model.get_decoder()(input_ids=ids[:, past.get_seq_length() : first], past_key_values=past)
    steps = [model(ids[:, at : at + 1], past_key_values=past).logits[0] for at in range(first, TOKENS)]
    return torch.cat(steps).float(), cache


@pytest.mark.parametrize("kind", CACHES)
def test_logits_and_memory(kind, model):
    exact, _ = read(model, "dynamic", "sdpa")
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    found, cache = read(model, kind, NAME)
    peak = torch.cuda.max_memory_allocated()
    change = (found - exact).abs().mean() / exact.std()
    assert change < WORST[kind], change
    if kind not in ("dynamic", "offloaded"):
        assert change > 1e-5, "the cache was quantized"
    bytes_estimated = cache_bytes(model.config, kind, TOKENS)
    assert tensor_bytes(cache._cache) == pytest.approx(bytes_estimated, rel=1e-3)  # the kernel's table is not counted
    estimate = need(Reading(model.config, in_4bit=False), kind, TOKENS, CHUNK)
    assert 0.8 * (estimate.weights + estimate.cache) < peak < 1.02 * estimate.peak


@pytest.mark.parametrize("kind", ["int8", "int4", "int2"])
def test_the_kernel_equals_dequantized_blocks(kind, model, monkeypatch):
    with_kernel, _ = read(model, kind, NAME)
    monkeypatch.setattr("component.inference.block_attention.HAS_TRITON", False)
    without, _ = read(model, kind, NAME)
    assert (with_kernel - without).abs().mean() / without.std() < 0.01
