"""Shapes of models: their published numbers of parameters, and models that are trained on the CPU."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from component.model import without_weights
from script.performance.evaluation import SMALL
from script.performance.report import flop_of
from script.shared.random_model import config_of, make_model
from script.shared.shape import SHAPES

PARAMETERS = {  # of the models on the hub
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_248_023_552,
    "135m": 134_515_008,
}
FAMILIES = ["7b", "llama3-8b", "qwen2.5-7b", "mistral-7b"]


def small(size: str):
    """Few and small layers; heads, biases and what else is the family's stay."""
    shape = SHAPES[size]
    return replace(shape, hidden=4 * shape.heads, mlp=48, layers=2, vocabulary=shape.vocabulary // 64, context=256)


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters(size):
    shape = (SHAPES | SMALL)[size]
    model = without_weights(config_of(shape))
    assert model.num_parameters() == PARAMETERS[size]
    linear = [m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    assert shape.weights == sum(linear)


@pytest.mark.parametrize("size", FAMILIES)
def test_flop_equal_those_that_torch_counts(size):
    """Of a step that recomputes every layer, on frozen weights; eager attention also computes the pairs it masks."""
    shape, tokens = small(size), 24
    model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.float32, attn_implementation="eager")
    model.requires_grad_(False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    ids = torch.randint(shape.vocabulary, (1, tokens))
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    masked = 16 * shape.layers * shape.hidden * (tokens**2 - tokens * (tokens + 1) / 2)
    assert counter.get_total_flops() == flop_of(shape, tokens, None) + masked


@pytest.mark.parametrize("size", FAMILIES)
def test_a_model_is_written_with_a_tokenizer_of_fewer_words(size, base_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, size, small(size))
    make_model(size, str(base_folder), tmp_path / "model")
    assert torch.get_default_dtype() == torch.float32
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.model_type == small(size).family
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) < config.vocab_size
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float16
    assert (model.model.layers[0].self_attn.q_proj.bias is not None) == (size == "qwen2.5-7b")
    assert model.model.layers[0].self_attn.k_proj.out_features == 4 * SHAPES[size].kv_heads
    assert float(model.lm_head.weight.detach().std()) > 0.01
