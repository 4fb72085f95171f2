"""Models that cannot be trained with some keys."""

from subprocess import CalledProcessError

import pytest
import torch
from transformers import Gemma2Config, GPTNeoXConfig, LlamaConfig, MistralConfig

from component.error import UserError
from component.float8 import product
from component.rope import extend_context
from component.train.argument import LongQLoRAArguments
from component.train.model_check import check_float8, check_graph, check_skipping, check_split_rows, chosen_matmul


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_models_whose_positions_can_be_skipped(rope_type):
    config = LlamaConfig(max_position_embeddings=64)
    extend_context(config, 192, rope_type)
    check_skipping(config, 192)
    check_skipping(MistralConfig(max_position_embeddings=64, sliding_window=192), 192)
    check_skipping(MistralConfig(max_position_embeddings=64, sliding_window=None), 192)


def test_models_whose_positions_cannot_be_skipped():
    config = LlamaConfig(max_position_embeddings=64)
    extend_context(config, 192, "dynamic")
    with pytest.raises(UserError, match=r"^position_skipping: true, but dynamic positions.*rope_type: linear"):
        check_skipping(config, 192)
    for config in (MistralConfig(sliding_window=191), Gemma2Config()):
        with pytest.raises(UserError, match=f"^position_skipping: true, but {config.model_type}'s own attention"):
            check_skipping(config, 192)


def test_models_that_cannot_be_multiplied_in_float8():
    sizes = {"hidden_size": 64, "intermediate_size": 112, "vocab_size": 96}
    key = "frozen_matmul: fp8"
    check_float8(LlamaConfig(**sizes), key)
    check_float8(MistralConfig(**sizes), key)
    with pytest.raises(UserError, match=r"^frozen_matmul: fp8, but .* model type 'gemma2'; set it to auto"):
        check_float8(Gemma2Config(**sizes, pad_token_id=0), key)
    with pytest.raises(UserError, match="model type 'gpt_neox'"):  # whose layers have other names
        check_float8(GPTNeoXConfig(**sizes, num_attention_heads=4), key)


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "fp8_backward"),
        ({"bf16": False}, "unquantized"),
        ({"memory_plan": False}, "unquantized"),
        ({"config": Gemma2Config()}, "unquantized"),
        ({"config": LlamaConfig(hidden_size=2048)}, "unquantized"),
        ({"device": torch.device("cpu")}, "unquantized"),
        ({"capability": (8, 6)}, "unquantized"),
        ({"error": RuntimeError("not implemented on this GPU")}, "unquantized"),
        ({"error": CalledProcessError(1, ["gcc"])}, "unquantized"),  # Triton's, without a compiler
        ({"recorded": "unquantized"}, "unquantized"),
        ({"recorded": "fp8"}, "fp8"),
        ({"recorded": "fp8", "capability": (8, 6)}, "unquantized"),
        ({"recorded": "unquantized", "frozen_matmul": "fp8"}, "fp8"),
        ({"frozen_matmul": "unquantized"}, "unquantized"),
        ({"frozen_matmul": "fp8"}, "fp8"),
        ({"frozen_matmul": "fp8_backward", "bf16": False}, "fp8_backward"),  # refused or simulated elsewhere
    ],
    ids=str,
)
def test_what_auto_multiplies_in(changes, chosen, monkeypatch):
    """On a GPU whose answers are written here; whether a real one computes these products: test_product.py."""
    found = {"config": LlamaConfig(hidden_size=3072), "device": torch.device("cuda", 0), "bf16": True, **changes}

    def try_out(*_):
        if "error" in found:
            raise found["error"]

    monkeypatch.setattr(product, "_multiplies_float8", lambda _: found.get("capability", (8, 9)) >= product.CAPABILITY)
    monkeypatch.setattr(product, "_has_triton", lambda: True)
    monkeypatch.setattr(product, "_multiplies", try_out)
    product.is_fast.cache_clear()
    mine = {key: found[key] for key in ("frozen_matmul", "memory_plan") if key in found}
    args = LongQLoRAArguments("model", "a.jsonl", False, 64, 64, **mine)
    words = (args, found["config"], found["device"], found["bf16"])
    assert chosen_matmul(*words, found.get("recorded")) == chosen
    product.is_fast.cache_clear()


def test_models_whose_rows_cannot_be_split():
    config = LlamaConfig(max_position_embeddings=64)
    check_split_rows(config, 192, 2)
    check_split_rows(Gemma2Config(), 192, 1)
    extend_context(config, 192, "dynamic")
    with pytest.raises(UserError, match=r"^sequence_parallel_size: 2, but dynamic positions .* rope_type: yarn"):
        check_split_rows(config, 192, 2)
    with pytest.raises(UserError, match=r"^sequence_parallel_size: 4, but gemma2's own attention .* set it to 1"):
        check_split_rows(Gemma2Config(), 192, 4)


def test_models_that_cannot_be_recorded():
    config = LlamaConfig(max_position_embeddings=64)
    extend_context(config, 192, "yarn")
    check_graph(config, 192)
    with pytest.raises(UserError, match=r"^cuda_graph: true, but the model's attention_dropout draws"):
        check_graph(LlamaConfig(attention_dropout=0.1), 192)
    extend_context(config := LlamaConfig(max_position_embeddings=64), 192, "dynamic")
    with pytest.raises(UserError, match=r"^cuda_graph: true, but dynamic positions .* rope_type: yarn"):
        check_graph(config, 48)  # within the original context too: transformers looks at each batch
    for config in (Gemma2Config(), MistralConfig(sliding_window=191)):
        with pytest.raises(UserError, match=f"^cuda_graph: true, but .* model type '{config.model_type}'"):
            check_graph(config, 192)
