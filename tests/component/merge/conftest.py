"""Fixtures of the merge tests."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig


@pytest.fixture(scope="module")
def bases(tmp_path_factory, llama_config):
    """bases(tied, config class, dtype) -> a folder with a grouped-query base whose rows are one NF4 block wide."""
    made: dict[tuple, Path] = {}

    def make(tied: bool = False, config_class=LlamaConfig, dtype=torch.float32) -> Path:
        if (tied, config_class, dtype) not in made:
            shape = {
                key: getattr(llama_config, key)
                for key in ("vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                            "max_position_embeddings", "bos_token_id", "eos_token_id")
            }  # fmt: skip
            config = config_class(
                **shape, hidden_size=64, intermediate_size=128, initializer_range=0.14, tie_word_embeddings=tied
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                model = AutoModelForCausalLM.from_config(config)
                for parameter in model.parameters():  # norms of one and biases of zero would hide missing tensors
                    parameter.data += 0.1 * torch.randn_like(parameter)
            made[tied, config_class, dtype] = tmp_path_factory.mktemp("base")
            model.to(dtype).save_pretrained(made[tied, config_class, dtype])
        return made[tied, config_class, dtype]

    return make
