"""What of a stranger's config.json is used?"""

import json

import pytest
import torch

from component.config import read_config, read_generation_config
from component.error import UserError
from component.model import load_base, load_config
from tests.component.test_model import change_config

KERNEL = "someone/kernel"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", KERNEL),
        ("_attn_implementation", KERNEL),
        ("_attn_implementation_internal", KERNEL),
        ("attn_implementation", {"": KERNEL}),
        ("experts_implementation", KERNEL),
        ("_experts_implementation", KERNEL),
        ("kernel_config", {"RMSNorm": KERNEL}),
        ("use_kernels", True),
        ("auto_map", {"AutoModelForCausalLM": "evil.Model"}),
        ("custom_generate", KERNEL),
        ("transformers_weights", "../other.safetensors"),
        ("save_pretrained", 5),
        ("attribute_map", {"hidden_size": "x"}),
        ("per_layer_config", {"0": {"hidden_size": 3}}),
        ("return_dict", False),
        ("output_hidden_states", True),
        ("is_encoder_decoder", True),
    ],
)
def test_k16_keys_that_are_left_out(own_base, key, value, monkeypatch):
    """They reach no kernel, and no config that is saved."""
    change_config(own_base, **{key: value})
    asked = []
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", asked.append)
    config = load_config(str(own_base))
    model = load_base(str(own_base), config, dtype=torch.float32, load_in_4bit=False, device=torch.device("cpu"))
    assert model.config._attn_implementation == "sdpa"
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
    assert not asked
    config.save_pretrained(own_base)
    assert KERNEL not in (own_base / "config.json").read_text()
    assert json.loads((own_base / "config.json").read_text()).get(key) != value


def test_what_a_model_is_made_of_is_kept(own_base):
    change_config(own_base, hidden_act="gelu", rope_theta=5e5, head_dim=16, sliding_window=7, eos_token_id=[1, 2])
    config = read_config(str(own_base))
    assert (config.hidden_act, config.head_dim, config.eos_token_id) == ("gelu", 16, [1, 2])
    assert config.name_or_path == str(own_base)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("hidden_size", "abc", "hidden_size: 'abc' is no whole number from 1 to 2,147,483,647"),
        ("hidden_size", -32, "hidden_size: -32 is no whole number"),
        ("hidden_size", 10**30, "hidden_size: 1000000000000000000000000000000 is no whole number"),
        ("num_attention_heads", 0, "num_attention_heads: 0 is no whole number"),
        ("num_attention_heads", True, "num_attention_heads: True is no whole number"),
        ("num_key_value_heads", 3, "num_attention_heads: 4 is no multiple of num_key_value_heads, 3"),
        ("num_hidden_layers", 10**9, "num_hidden_layers: 1000000000 is no whole number from 1 to 1,000"),
        ("vocab_size", [384], r"vocab_size: \[384\] is no whole number"),
        ("hidden_act", "silo", r"hidden_act: 'silo' is no activation of transformers \(did you mean silu\?\)"),
        ("hidden_act", ["silu"], "hidden_act"),
        ("rope_parameters", {"rope_type": "liner", "rope_theta": 1e4}, "rope_type: 'liner' is none of default"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}, "factor: 0 is no number above 0"),
        (
            "rope_parameters",
            {"rope_type": "linear", "rope_theta": 0, "factor": 2.0},
            "rope_theta: 0 is no number above 0",
        ),
        ("rope_parameters", [1], "rope_parameters"),
        ("rms_norm_eps", -1.0, "rms_norm_eps: -1.0 is not from 0 to 1"),
        ("rms_norm_eps", "x", "expected float, got str"),
        ("dtype", "load", "dtype: 'load' is no dtype of PyTorch"),
        ("model_type", "lama", r"model_type 'lama', which transformers does not know \(did you mean "),
        ("model_type", ["llama"], "model_type"),
        ("eos_token_id", "x", "eos_token_id"),
        ("tie_word_embeddings", [], "expected bool, got list"),
    ],
)
def test_k15_values_that_no_model_has(own_base, key, value, reason):
    change_config(own_base, **{key: value})
    with pytest.raises(UserError, match=f"^base_model: '{own_base}' has no usable config .*{reason}") as error:
        load_config(str(own_base), "base_model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("eos_token_id", "x", "eos_token_id is 'x', not a whole number"),
        ("eos_token_id", [1, None], r"eos_token_id is '\[1, None\]', not a whole number"),
        ("temperature", "hot", "temperature is 'hot', not a number"),
        ("do_sample", 1, "do_sample is '1', not true or false"),
    ],
)
def test_k15_a_generation_config(own_base, key, value, problem):
    (own_base / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(UserError, match=f"{own_base}/generation_config.json: {problem}; correct or remove it"):
        read_generation_config(str(own_base))


def test_k16_what_of_a_generation_config_is_left_out(own_base):
    text = {"eos_token_id": [1, 2], "top_p": 0.5, "custom_generate": KERNEL, "compile_config": {"backend": "x"}}
    (own_base / "generation_config.json").write_text(json.dumps(text))
    config = read_generation_config(str(own_base))
    assert (config.eos_token_id, config.top_p, config.compile_config) == ([1, 2], 0.5, None)
    assert not hasattr(config, "custom_generate")
    (own_base / "generation_config.json").unlink()
    assert read_generation_config(str(own_base)) is None
