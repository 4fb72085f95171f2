"""How are keys and values cached? As in transformers, in the number of bytes calculated here."""

import pytest
import torch
from transformers import DynamicCache

from component.error import UserError
from component.inference.flags import CACHES
from component.inference.kv_cache import (
    PromptCache,
    check_cache,
    common_prefix,
    group_values,
    new_cache,
    tensor_bytes,
)
from component.rope import extend_context
from tests.conftest import build_llama

KINDS = [name for name in CACHES if name != "offloaded"]
TOKENS, LAYERS, VALUES = 40, 2, 2 * 8  # 2 key/value heads of 8 values


def filled(model, implementation: str):
    cache = new_cache(model.config, implementation)
    with torch.no_grad():
        model(torch.arange(5, 5 + TOKENS)[None], past_key_values=cache)
    return cache


class TestBytes:
    def test_fp32_and_fp8(self, tiny_llama):
        numbers = 2 * LAYERS * TOKENS * VALUES
        scales = 2 * LAYERS * 4  # fp8: one float32 for the keys of a layer and one for its values
        assert tensor_bytes(filled(tiny_llama, "dynamic")) == 4 * numbers == 10240
        assert tensor_bytes(filled(tiny_llama, "fp8")) == numbers + scales == 2576

    def test_fewer_bits_fewer_bytes(self, tiny_llama_config):
        """Heads of 32 values in groups of 32."""
        tiny_llama_config.head_dim, tiny_llama_config.num_key_value_heads = 32, 4
        model = build_llama(tiny_llama_config).eval()
        numbers = 2 * LAYERS * TOKENS * 4 * 32
        held = {name: tensor_bytes(filled(model, name)) for name in ("dynamic", "int8", "int4", "int2")}
        scales = numbers // 32 * 8  # a scale and a zero point, float32
        assert held == {
            "dynamic": 4 * numbers,
            "int8": numbers + scales,
            "int4": numbers // 2 + scales,
            "int2": numbers // 4 + scales,
        }

    def test_a_tensor_stored_twice_counts_once(self, tiny_llama):
        cache = filled(tiny_llama, "dynamic")
        cache.layers[0].again = [cache.layers[0].keys, {"x": cache.layers[0].keys}]
        assert tensor_bytes(cache) == 10240


class TestNewCache:
    @pytest.mark.parametrize("implementation", ["dynamic", "fp8", "int8"])
    def test_first_token_equals_that_of_the_default_cache(self, implementation, tiny_llama):
        ids = torch.arange(5, 45)[None]
        exact = tiny_llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        cache = new_cache(tiny_llama.config, implementation)
        out = tiny_llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, past_key_values=cache
        )
        assert out[0, 40].item() == exact[0, 40].item(), "the first token attends to unquantized keys and values"
        assert cache.get_seq_length() == 43

    @pytest.mark.parametrize(("implementation", "worst"), [("fp8", 0.2), ("int8", 0.02), ("int4", 1.0)])
    def test_quantization_error_is_small(self, implementation, worst, tiny_llama):
        step = torch.tensor([[7]])
        with torch.no_grad():
            exact = tiny_llama(step, past_key_values=filled(tiny_llama, "dynamic")).logits
            quantized = tiny_llama(step, past_key_values=filled(tiny_llama, implementation)).logits
        change = (exact - quantized).abs().max()
        assert 0 < change < worst, change

    @pytest.mark.parametrize(("implementation", "head"), [("int8", 8), ("int4", 8), ("int2", 16)])
    def test_an_odd_number_of_tokens(self, implementation, head, tiny_llama_config):
        """hqq packs values of several groups into a byte, so the number of groups must divide evenly at any length."""
        tiny_llama_config.head_dim = head
        model = build_llama(tiny_llama_config).eval()
        for tokens in (1, 3, 7):
            cache = new_cache(model.config, implementation)
            with torch.no_grad():
                model(torch.arange(5, 5 + tokens)[None], past_key_values=cache)
                assert model(torch.tensor([[7]]), past_key_values=cache).logits.isfinite().all()

    @pytest.mark.parametrize(
        ("head", "heads", "bits", "values"),
        [(128, 32, 4, 64), (64, 4, 2, 64), (64, 2, 2, 32), (64, 1, 8, 64), (64, 1, 4, 32), (128, 1, 2, 32)],
    )
    def test_groups(self, head, heads, bits, values, tiny_llama_config):
        tiny_llama_config.head_dim, tiny_llama_config.num_key_value_heads = head, heads
        assert group_values(tiny_llama_config, bits) == values

    @pytest.mark.parametrize(("head", "bits"), [(12, 4), (8, 2)])
    def test_heads_that_cannot_be_grouped(self, head, bits, tiny_llama_config):
        tiny_llama_config.head_dim = head
        with pytest.raises(UserError, match=rf"2 heads of {head} values .* {bits} bits .* use fp8 or dynamic"):
            group_values(tiny_llama_config, bits)

    def test_a_transformers_without_fp8(self, monkeypatch):
        monkeypatch.delattr("transformers.cache_utils.Fp8QuantizedLayer", raising=False)
        with pytest.raises(UserError, match=r"--cache_implementation: .* no fp8; install .* or use int8"):
            check_cache("fp8")

    def test_without_hqq(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"int4 needs the package hqq; pip install hqq=="):
            check_cache("int4")
        check_cache("dynamic")

    def test_offloaded_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(UserError, match=r"--cache_implementation: offloaded .* use dynamic"):
            check_cache("offloaded")


class TestPromptCache:
    """The prefix that two prompts share is computed once."""

    def feed(self, model, cache: PromptCache, ids: list[int]) -> torch.Tensor:
        """Logits after `ids`; the cache may already hold a prefix of them."""
        past = cache.start(ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids[past.get_seq_length() :]]), past_key_values=past).logits[0, -1]
        cache.finish(ids)
        return logits

    @pytest.mark.parametrize(
        ("second", "shared"),
        [([5, 6, 7, 8, 9], 4), ([5, 6, 9], 2), ([5, 6, 7, 8], 3), ([5], 0), ([9, 6, 7, 8], 0)],
        ids=["longer", "different from the third on", "the same", "its prefix", "another"],
    )
    def test_the_second_prompt(self, second, shared, tiny_llama):
        cache = PromptCache(tiny_llama.config)
        self.feed(tiny_llama, cache, [5, 6, 7, 8])
        assert cache.start(second).get_seq_length() == shared
        cache.forget()
        self.feed(tiny_llama, cache, [5, 6, 7, 8])
        with torch.no_grad():
            expected = tiny_llama(torch.tensor([second])).logits[0, -1]
        torch.testing.assert_close(self.feed(tiny_llama, cache, second), expected)

    def test_without_finish_the_content_is_not_reused(self, tiny_llama):
        cache = PromptCache(tiny_llama.config)
        self.feed(tiny_llama, cache, [5, 6, 7, 8])
        cache.start([5, 6, 7, 8, 9])  # no finish
        assert cache.start([5, 6, 7, 8, 9]).get_seq_length() == 0

    def test_the_last_token_of_an_answer_is_not_cached(self, tiny_llama):
        cache = PromptCache(tiny_llama.config)
        past = cache.start([5, 6])
        with torch.no_grad():
            tiny_llama(torch.tensor([[5, 6]]), past_key_values=past)
        cache.finish([5, 6, 7])
        assert cache.start([5, 6, 7, 8]).get_seq_length() == 2

    @pytest.mark.parametrize("implementation", ["fp8", "int4"])
    def test_quantized_caches_start_empty(self, implementation, tiny_llama):
        cache = PromptCache(tiny_llama.config, implementation)
        self.feed(tiny_llama, cache, [5, 6, 7, 8])
        assert cache.start([5, 6, 7, 8, 9]).get_seq_length() == 0

    def test_dynamic_rope_starts_empty(self, tiny_llama_config):
        extend_context(tiny_llama_config, 256, "dynamic")
        model = build_llama(tiny_llama_config).eval()
        cache = PromptCache(model.config)
        self.feed(model, cache, [5, 6, 7, 8])
        assert cache.start([5, 6, 7, 8, 9]).get_seq_length() == 0

    def test_bytes(self, tiny_llama):
        cache = PromptCache(tiny_llama.config)
        assert cache.nbytes == 0
        self.feed(tiny_llama, cache, [5, 6, 7, 8])
        assert cache.nbytes == 2 * 2 * 4 * 16 * 4
        assert isinstance(cache.start([5]), DynamicCache)


def test_common_prefix():
    assert [common_prefix([1, 2, 3], other) for other in ([], [1], [2], [1, 2, 9], [1, 2, 3, 4])] == [0, 1, 0, 2, 3]
