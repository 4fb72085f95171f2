"""Does generation fit in memory, with which KV cache? Bytes as counted in real caches, and LLaMA2's by hand."""

import math

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from component.error import UserError
from component.inference import quantized_layer
from component.inference.block_attention import NAME
from component.inference.cache_memory import (
    Reading,
    available_memory,
    best_chunk,
    cache_bytes,
    choose_cache,
    choose_for_context,
    describe_choice,
    longest_context,
    need,
)
from component.inference.kv_cache import new_cache, tensor_bytes
from component.memory.workload import GIB
from component.rope import extend_context

KINDS = ["dynamic", "int8", "fp8", "int4", "int2"]
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
HOST = 256 * GIB
RECENT = 32 * 2 * 64 * 4096 * 2  # bytes, of 64 tokens of LLaMA2-7B in 16 bits


@pytest.fixture
def seven() -> LlamaConfig:
    """LLaMA2-7B, extended to 131072 tokens."""
    config = LlamaConfig(**SEVEN, max_position_embeddings=4096, vocab_size=32000)
    extend_context(config, 131072)
    return config


class TestCacheBytes:
    @pytest.mark.parametrize("tokens", [1, 63, 64, 191, 192, 193, 1000])
    @pytest.mark.parametrize("head_size", [8, 12, 96, 128])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_equal_those_of_tensors(self, tokens, head_size, dtype, monkeypatch):
        monkeypatch.setattr(quantized_layer, "SEGMENT", 3)
        config = LlamaConfig(
            hidden_size=4 * head_size, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3
        )
        config._attn_implementation = NAME
        states = torch.randn(1, 2, tokens, head_size, dtype=dtype)
        for kind in KINDS:
            cache = new_cache(config, kind)
            for layer in range(3):
                for part in states.split(100, 2):
                    cache.update(part, part, layer)
            assert tensor_bytes(cache) == cache_bytes(config, kind, tokens, dtype.itemsize), kind

    def test_of_7b_by_hand(self, seven):
        """32 layers of 2 x 4096 numbers a token; of 64 keys, and of 64 channels of a value, two 16-bit scales.

        And 64 tokens as computed.
        """
        numbers = 32 * 2 * 4096 * 131072
        assert cache_bytes(seven, "dynamic", 131072) == numbers * 2 == 64 * GIB
        assert cache_bytes(seven, "int8", 131072) == numbers + numbers // 64 * 4 + RECENT == 34 * GIB + RECENT
        assert cache_bytes(seven, "int4", 131072) == numbers // 2 + numbers // 64 * 4 + RECENT == 18 * GIB + RECENT
        assert cache_bytes(seven, "int2", 131072) == 10 * GIB + RECENT
        scales = 32 * 2 * 32 * 131072 // 64  # of each layer, keys or values, head and block
        assert cache_bytes(seven, "fp8", 131072) == numbers + 2 * scales + RECENT

    def test_a_part_of_a_segment_and_of_a_block(self, seven):
        """8193 tokens: a segment, and a block for one token as computed; 8256: a block in a second segment."""
        segment = 18 * GIB // 16
        assert cache_bytes(seven, "int4", 8193) == segment + RECENT
        assert cache_bytes(seven, "int4", 8256) == 2 * segment + RECENT
        assert quantized_layer.SEGMENT * quantized_layer.BLOCK == 8192


class TestNeed:
    def test_weights(self, seven):
        linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
        in_4bit, in_16bit = (need(Reading(seven, value), "int4", 1000, 512).weights for value in (True, False))
        assert in_16bit == 2 * linear + 2 * 2 * 32000 * 4096
        assert in_4bit == linear * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * 2 * 32000 * 4096

    def test_workspace_grows_with_the_forward_pass(self, seven):
        reading = Reading(seven, True)
        small, large = (need(reading, "int4", 120_000, chunk).workspace for chunk in (512, 4096))
        # per token: hidden states and an fp32 copy, and the MLP's gate, up and product
        assert large - small >= 3584 * (4096 * 8 + 3 * 11008 * 2)
        assert large < 2 * GIB

    def test_other_attentions_hold_all_at_once(self, seven):
        """A chunk of 1024 tokens to 65536: their mask, scores of 32 heads, and keys and values as computed."""
        pairs, layer = 1024 * 65536, 65536 * 4096 * 2
        extra = {}
        for attention in ("sdpa", "eager", "flash_attention_2"):
            for name in ("dynamic", "int8"):
                found = need(Reading(seven, True, attention=attention), name, 65536, 1024)
                extra[attention, name] = found.workspace
        eager = pairs * (3 + 32 * 8)
        for name in ("dynamic", "int8"):
            assert extra["eager", name] - extra["flash_attention_2", name] == eager
        assert extra["flash_attention_2", "dynamic"] == extra["sdpa", "dynamic"]
        segment = 8192 * 4096 * 6
        assert extra["flash_attention_2", "int8"] - extra["sdpa", "int8"] == 5 * layer - segment


class TestChooseCache:
    @pytest.mark.parametrize(
        ("gib", "tokens", "name"),
        [
            *((80, 120_000, "dynamic"), (48, 120_000, "int8"), (35, 120_000, "fp8"), (31, 120_000, "int4")),
            *((31, 16_384, "dynamic"), (23, 32_768, "dynamic"), (23, 120_000, "int4")),
        ],
    )
    def test_the_most_exact_that_fits(self, gib, tokens, name, seven):
        assert choose_cache(Reading(seven, True), tokens, gib * GIB, HOST).cache_name == name

    def test_a_whole_context_in_4_bits_on_32_gib(self, seven):
        found = choose_cache(Reading(seven, True), 131072, 31 * GIB, HOST)
        assert (found.cache_name, found.chunk) == ("int4", 4096)
        assert found.cache == 18 * GIB + RECENT
        assert 22 * GIB < found.peak < 25 * GIB

    def test_16_bit_weights_leave_less(self, seven):
        assert choose_cache(Reading(seven, False), 60_000, 28 * GIB, HOST).cache_name == "int4"
        assert choose_cache(Reading(seven, True), 60_000, 28 * GIB, HOST).cache_name == "int8"

    def test_shorter_forward_passes_where_memory_is_short(self, seven):
        reading = Reading(seven, True)
        needed = {chunk: need(reading, "int4", 131072, chunk).peak for chunk in (4096, 2048, 512)}
        assert best_chunk(reading, "int4", 131072, needed[2048], HOST).chunk == 2048
        assert best_chunk(reading, "int4", 131072, needed[512], HOST).chunk == 512
        assert best_chunk(reading, "int4", 131072, needed[512] - 1, HOST) is None

    def test_offloaded_if_nothing_else_fits(self, seven):
        found = choose_cache(Reading(seven, True), 131072, 16 * GIB, HOST)
        assert (found.cache_name, found.cache, found.host) == ("offloaded", 0, 64 * GIB)

    def test_none_fits(self, seven):
        with pytest.raises(UserError) as error:
            choose_cache(Reading(seven, False), 131072, 20 * GIB, GIB)
        text = str(error.value)
        assert "131072 tokens: int4 needs 3" in text
        assert "(12.6 of weights, 18.0 of keys and values)" in text
        assert "20.0 GiB are free" in text
        assert "--load_in_4bit" in text
        longest = longest_context(Reading(seven, False), "int4", 20 * GIB, GIB)
        assert f"shorten the text to {longest} tokens" in text
        assert choose_cache(Reading(seven, False), longest, 20 * GIB, GIB).cache_name == "int4"
        with pytest.raises(UserError):
            choose_cache(Reading(seven, False), longest + 1024, 20 * GIB, GIB)

    def test_as_much_of_the_context_as_fits(self, seven):
        found, tokens = choose_for_context(Reading(seven, False), 20 * GIB, GIB)
        assert (found.cache_name, tokens) == ("int4", longest_context(Reading(seven, False), "int4", 20 * GIB, GIB))
        assert found.peak <= 20 * GIB
        assert "longer texts do not fit, of the model's 131072" in describe_choice(found, tokens, 131072)
        found, tokens = choose_for_context(Reading(seven, True), 32 * GIB, GIB)
        assert (found.cache_name, tokens) == ("int4", 131072)
        assert "longer" not in describe_choice(found, tokens, 131072)
        with pytest.raises(UserError, match="for 131072 tokens"):
            choose_for_context(Reading(seven, False), 12 * GIB, GIB)

    def test_rows_are_never_quantized(self, seven):
        assert choose_cache(Reading(seven, True, rows=8), 16_384, 31 * GIB, HOST).cache_name == "offloaded"
        with pytest.raises(UserError, match=r"in 8 rows: dynamic needs .* set --batch_size 1"):
            choose_cache(Reading(seven, True, rows=8), 16_384, 31 * GIB, GIB)

    def test_sliding_windows_are_never_quantized(self):
        config = MistralConfig(sliding_window=4096, max_position_embeddings=32768)
        assert choose_cache(Reading(config, True), 32768, 7 * GIB, HOST).cache_name == "offloaded"

    def test_frequencies_that_depend_on_the_length(self, seven):
        """One forward pass."""
        config = LlamaConfig(**SEVEN, max_position_embeddings=4096)
        extend_context(config, 32768, "dynamic")
        reading = Reading(config, True)
        assert choose_cache(reading, 32768, 80 * GIB, HOST).chunk == 32768
        least = min(need(reading, name, 32768, 32768).peak for name in ("dynamic", "int8", "fp8", "int4"))
        assert need(reading, "int4", 32768, 512).peak < least - GIB, "else this looks at nothing"
        with pytest.raises(UserError, match=f"needs {least / GIB:.1f} GiB"):  # not those of shorter passes
            choose_cache(reading, 32768, least - GIB, 0)


def test_without_a_gpu_anything_fits(seven):
    assert available_memory(torch.device("cpu")) == (math.inf, math.inf)
    assert choose_cache(Reading(seven, False), 10**7, math.inf, math.inf).cache_name == "dynamic"


def test_what_is_free_on_a_gpu(monkeypatch):
    """A cap on PyTorch's allocator counts, less what it already holds."""
    for name, value in {
        "mem_get_info": (60 * GIB, 80 * GIB),
        "memory_reserved": 2 * GIB,
        "get_per_process_memory_fraction": 1.0,
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
    device = torch.device("cuda", 0)
    assert available_memory(device)[0] == pytest.approx(0.98 * (60 - 0.6) * GIB)
    monkeypatch.setattr("torch.cuda.get_per_process_memory_fraction", lambda device: 0.4)
    assert available_memory(device)[0] == pytest.approx(0.98 * (0.4 * 80 - 2) * GIB)
