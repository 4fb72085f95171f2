"""The config of a merged model by rope type, against literal values; dynamic scaling frozen at its longest text."""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from component.merge.serving import (
    add_legacy_keys,
    frozen_theta,
    problems_elsewhere,
    renew_config,
    served_config,
    with_legacy_tokenizer,
)
from component.model import load_config
from component.rope import extend_context

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
SIZES |= {"num_hidden_layers": 2, "vocab_size": 97, "max_position_embeddings": 32}


def extended(rope_type: str, tokens: int = 128) -> LlamaConfig:
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    extend_context(config, tokens, rope_type)
    return config


# by rope type: max_position_embeddings, rope_parameters, and rope_scaling, of 32 tokens extended to 128. dynamic's
# theta by hand: 10000 * (4 * 128 / 32 - 3) ** (16 / 14)
WRITTEN = {
    "linear": (32, {"rope_type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        128,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "dynamic": (128, {"rope_type": "default"}, None),
}
THETA = {"dynamic": 10000.0 * 13.0 ** (16 / 14)}


@pytest.mark.parametrize("rope_type", WRITTEN)
def test_what_is_written(rope_type, tmp_path):
    served_config(extended(rope_type)).save_pretrained(tmp_path)
    add_legacy_keys(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    longest, parameters, scaling = WRITTEN[rope_type]
    theta = THETA.get(rope_type, 10000.0)
    assert found["max_position_embeddings"] == longest
    assert found["rope_theta"] == pytest.approx(theta, rel=1e-12)
    assert found["rope_scaling"] == scaling
    assert found["rope_parameters"].pop("rope_theta") == pytest.approx(theta, rel=1e-12)
    assert found["rope_parameters"] == parameters
    again = load_config(str(tmp_path))
    assert again.max_position_embeddings == longest
    assert {key: again.rope_parameters[key] for key in parameters} == parameters


def logits(config: LlamaConfig, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(config)).eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("rope_type", WRITTEN)
def test_the_longest_text_is_computed_as_before(rope_type):
    """Dynamic too, up to the rounding of theta; it is exact at its longest text, and nowhere else."""
    config, ids = extended(rope_type), torch.randint(97, (1, 128), generator=torch.Generator().manual_seed(1))
    gap = (logits(served_config(config), ids) - logits(config, ids)).abs().max()
    assert gap < (1e-5 if rope_type == "dynamic" else 1e-12)
    short = ids[:, :40]
    gap = (logits(served_config(config), short) - logits(config, short)).abs().max()
    assert (gap > 1e-3) == (rope_type == "dynamic")


def test_only_a_part_of_each_head_is_rotated():
    """(16 * 0.5 rotated dimensions): 13 ** (8 / 6)."""
    config = extended("dynamic")
    config.rope_parameters["partial_rotary_factor"] = 0.5
    assert frozen_theta(config, 128) == pytest.approx(10000.0 * 13.0 ** (8 / 6), rel=1e-12)
    assert served_config(config).rope_parameters["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_other_types_stay(rope_type):
    more = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    parameters = {"rope_type": rope_type, "rope_theta": 500.0} | (more if rope_type == "llama3" else {})
    config = LlamaConfig(**SIZES, rope_parameters=parameters)
    served = served_config(config)
    assert (served.rope_parameters, served.max_position_embeddings) == (config.rope_parameters, 32)


PROBLEMS = {
    "linear": ["rope_theta and rope_scaling are missing"],
    "yarn": ["max_position_embeddings is 32, not 128: vLLM", "rope_theta and rope_scaling are missing"],
    "dynamic": ["rope_type is dynamic, which vLLM", "rope_theta and rope_scaling are missing"],
}


@pytest.mark.parametrize("rope_type", PROBLEMS)
def test_an_earlier_merge(rope_type, tmp_path):
    """Its problems are told, and gone when its config is renewed; other keys stay."""
    extended(rope_type).save_pretrained(tmp_path)
    tokenizer = {"tokenizer_class": "TokenizersBackend", "model_max_length": 128, "extra_special_tokens": ["<s>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = json.loads((tmp_path / "config.json").read_text())
    found = problems_elsewhere(tmp_path, load_config(str(tmp_path)))
    assert [text.startswith(start) for text, start in zip(found[:-2], PROBLEMS[rope_type], strict=True)]
    assert found[-2:] == [
        f"{key} in tokenizer_config.json is unknown to transformers 4"
        for key in ("tokenizer_class", "extra_special_tokens")
    ]
    renew_config(tmp_path, load_config(str(tmp_path)))
    assert problems_elsewhere(tmp_path, load_config(str(tmp_path))) == []
    after = json.loads((tmp_path / "config.json").read_text())
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed <= {"rope_parameters", "max_position_embeddings", "rope_theta", "rope_scaling"}
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 128
    renew_config(tmp_path, load_config(str(tmp_path)))
    assert json.loads((tmp_path / "config.json").read_text()) == after


def test_the_tokenizer_of_transformers_4():
    """Its class, and its name for a list of special tokens; a dict it knows."""
    changed = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<s>"], "eos_token": "</s>"}
    assert with_legacy_tokenizer(changed) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<s>"],
        "eos_token": "</s>",
    }
    kept = {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<image>"}}
    assert with_legacy_tokenizer(kept) == kept
