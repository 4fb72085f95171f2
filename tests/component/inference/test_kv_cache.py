"""How are keys and values cached, and what of them is used again? As by stock transformers, or nearly so."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from component.error import UserError
from component.inference import quantized_layer
from component.inference.block_attention import NAME
from component.inference.generate import prefill
from component.inference.kv_cache import PromptCache, check_cache, common_prefix, new_cache, tensor_bytes
from component.rope import extend_context
from tests.conftest import build_llama

TOKENS = 40


def filled(model, implementation: str, tokens: int = TOKENS):
    cache = new_cache(model.config, implementation)
    ids = torch.randint(5, 300, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


class TestBytes:
    def test_fp32(self, tiny_llama):
        assert tensor_bytes(filled(tiny_llama, "dynamic")) == 4 * 2 * 2 * TOKENS * 2 * 8 == 10240

    def test_a_tensor_stored_twice_counts_once(self, tiny_llama):
        cache = filled(tiny_llama, "dynamic")
        cache.layers[0].again = [cache.layers[0].keys, {"x": cache.layers[0].keys}]
        assert tensor_bytes(cache) == 10240


class TestNewCache:
    @pytest.mark.parametrize("implementation", ["dynamic", "int8", "fp8", "int4", "int2"])
    def test_generate_equals_that_of_the_default_cache(self, implementation, tiny_llama):
        """Up to a full block, nothing is quantized."""
        ids = torch.arange(5, 45)[None]
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
        exact = tiny_llama.generate(ids, **options)
        cache = new_cache(tiny_llama.config, implementation)
        assert torch.equal(tiny_llama.generate(ids, **options, past_key_values=cache), exact)
        assert cache.get_seq_length() == exact.shape[1] - 1

    @pytest.mark.parametrize(
        ("implementation", "least", "most"), [("int8", 0.001, 0.05), ("fp8", 0.01, 0.3), ("int4", 0.05, 1.0)]
    )
    def test_quantization_error_is_small(self, implementation, least, most, tiny_llama_config):
        tiny_llama_config.max_position_embeddings = 512
        model, step = build_llama(tiny_llama_config).eval(), torch.tensor([[7]])
        with torch.no_grad():
            exact = model(step, past_key_values=filled(model, "dynamic", 300)).logits
            quantized = model(step, past_key_values=filled(model, implementation, 300)).logits
        assert least < (exact - quantized).abs().max() < most

    def test_sliding_windows_cannot_be_quantized(self):
        config = MistralConfig(num_hidden_layers=2, sliding_window=16)
        with pytest.raises(UserError, match=r"int4 is for models with full attention .* use dynamic or offloaded"):
            new_cache(config, "int4")

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

    def read(self, model, cache: PromptCache, ids: list[int], kept: int = 0) -> torch.Tensor:
        """Logits after `ids`, read in forward passes of `cache.chunk` tokens after the `kept` ones."""
        past = cache.start(ids)
        assert past.get_seq_length() == kept
        prefill(model, torch.tensor([ids]), past, cache.chunk)
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

    @pytest.mark.parametrize(
        ("implementation", "attention"),
        [*((kind, "sdpa") for kind in ("int8", "fp8", "int4", "int2")), ("int8", NAME), ("fp8", NAME)],
    )
    @pytest.mark.parametrize("tail", [0, 5, 100])
    def test_a_second_question_about_a_document(self, tail, implementation, attention, tiny_llama_config, monkeypatch):
        """As from an empty cache, though the first answer was computed token by token."""
        monkeypatch.setattr(quantized_layer, "SEGMENT", 3)
        tiny_llama_config.max_position_embeddings = 1024
        model = build_llama(tiny_llama_config).eval()
        model.set_attn_implementation(attention)
        ids = torch.randint(5, 300, (600,), generator=torch.Generator().manual_seed(1)).tolist()
        document, answer, question = ids[: 256 + tail], ids[360:530], ids[530:]
        kept, empty = (PromptCache(model.config, implementation, chunk=128) for _ in range(2))
        self.read(model, kept, document)
        for token in answer:
            with torch.no_grad():
                model(torch.tensor([[token]]), past_key_values=kept._cache)
        kept.finish(document + answer)
        second = document + answer + question
        expected = self.read(model, empty, second)
        assert torch.equal(self.read(model, kept, second, 256), expected), "256: whole forward passes of the document"
        other = [*second[:200], 7, *second[201:]]  # differs inside of the second pass, and the answer must too
        assert torch.equal(
            self.read(model, kept, other, 128), self.read(model, PromptCache(model.config, implementation, 128), other)
        )
        assert not torch.equal(self.read(model, kept, other, (len(other) - 1) // 128 * 128), expected)

    def test_dynamic_rope_starts_empty(self, tiny_llama_config):
        extend_context(tiny_llama_config, 256, "dynamic")
        model = build_llama(tiny_llama_config).eval()
        cache = PromptCache(model.config)
        self.feed(model, cache, [5, 6, 7, 8])
        assert cache.start([5, 6, 7, 8, 9]).get_seq_length() == 0

    @pytest.mark.parametrize(("first", "kept"), [(15, 12), (16, 0), (40, 0)])
    def test_a_sliding_window_that_has_moved_on_starts_empty(self, first, kept):
        """transformers cannot take tokens out of it again."""
        config = MistralConfig(
            **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16, "initializer_range": 0.2},
        )
        model, cache = MistralForCausalLM(config).eval(), PromptCache(config)
        ids = torch.randint(5, 300, (80,), generator=torch.Generator().manual_seed(1)).tolist()
        self.feed(model, cache, ids[:first])
        second = [*ids[:12], 7, *ids[13:30]]  # not as before from token 12 on
        with torch.no_grad():
            expected = model(torch.tensor([second])).logits[0, -1]
        torch.testing.assert_close(self.read(model, cache, second, kept), expected)
        longer = [*second, 8, 9]
        self.read(model, cache, longer, len(second))  # goes on from its end

    def test_bytes(self, tiny_llama):
        cache = PromptCache(tiny_llama.config)
        assert cache.nbytes == 0
        self.feed(tiny_llama, cache, [5, 6, 7, 8])
        assert cache.nbytes == 2 * 2 * 4 * 16 * 4
        assert isinstance(cache.start([5]), DynamicCache)


def test_common_prefix():
    assert [common_prefix([1, 2, 3], other) for other in ([], [1], [2], [1, 2, 9], [1, 2, 3, 4])] == [0, 1, 0, 2, 3]
