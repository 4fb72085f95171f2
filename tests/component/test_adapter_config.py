"""What of a stranger's adapter_config.json is used?"""

import json
import time

import pytest
from peft import LoraConfig

from component.adapter_config import check_patterns, read_adapter_config
from component.error import UserError

PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
NAMES = ["", *(f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(32) for name in "qkvo")]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter_config.json"


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("r", "8", "r is '8', not a whole number above 0"),
        ("r", 0, "r is 0, not a whole number above 0"),
        ("r", -4, "r is -4, not"),
        ("r", True, "r is True, not"),
        ("r", None, "r is None, not"),
        ("r", 10**12, "r is 1000000000000, not"),
        ("lora_alpha", "16", "lora_alpha is '16', not a number"),
        ("lora_alpha", None, "lora_alpha is None, not"),
        ("lora_dropout", 5, "lora_dropout is 5, not a number from 0 to 1"),
        ("target_modules", {"q_proj": 1}, "target_modules is .*, not a list of names, or a regular expression"),
        ("target_modules", [1], r"target_modules is \[1\], not"),
        ("rank_pattern", [1], r"rank_pattern is \[1\], not an object of whole numbers above 0"),
        ("alpha_pattern", {"q_proj": None}, "alpha_pattern is {'q_proj': None}, not an object of numbers"),
        ("use_dora", "yes", "use_dora is 'yes', not true or false"),
        ("bias", "some", "bias is 'some', not none, all or lora_only"),
        ("peft_type", "IA3", "peft_type is 'IA3', which is not LoRA"),
        ("peft_type", None, "peft_type is None, which is not LoRA"),
        ("task_type", "SEQ_CLS", "task_type is 'SEQ_CLS', not CAUSAL_LM"),
        ("layers_to_transform", ["x"], r"layers_to_transform is \['x'\], not a list of whole numbers"),
    ],
)
def test_k15_values_of_another_kind(file, key, value, problem):
    file.write_text(json.dumps(PLAIN | {key: value}))
    with pytest.raises(UserError, match=f"{file}: {problem}"):
        read_adapter_config(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [("megatron_config", {"a": 1}), ("alora_invocation_tokens", [1]), ("arrow_config", {"a": 1}), ("of_tomorrow", 1)],
)
def test_k16_keys_that_would_change_the_result(file, key, value):
    """With `megatron_config`, PEFT imports the module that `megatron_core` names."""
    file.write_text(json.dumps(PLAIN | {key: value, "megatron_core": "antigravity"}))
    with pytest.raises(UserError, match=f"{file}: {key} is .*, which is not supported here; use PEFT itself"):
        read_adapter_config(file)


def test_k16_keys_without_effect_are_left_out(file):
    file.write_text(json.dumps(PLAIN | {"megatron_core": "os", "auto_mapping": {"parent_library": "os"}, "x": None}))
    config = read_adapter_config(file)
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, {"q_proj"})
    assert (config.megatron_core, config.auto_mapping) == ("megatron.core", None)


def test_every_key_that_peft_writes_can_be_read(tmp_path, file):
    LoraConfig(**PLAIN, modules_to_save=["embed_tokens"], rank_pattern={"k_proj": 2}).save_pretrained(tmp_path)
    assert read_adapter_config(file).rank_pattern == {"k_proj": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "(.*)*x"},
        {"target_modules": ".*.*.*.*.*.*.*.*.*.*.*.*x"},
        {"target_modules": ["q_proj"], "exclude_modules": "(.*)*x"},
        {"target_modules": ["q_proj"], "rank_pattern": {"(.*)*x": 4}},
        {"target_modules": ["q_proj"], "alpha_pattern": {"(.*)*x": 4}},
        {"target_modules": ["q_proj"], "modules_to_save": ["(.*)*x"]},
    ],
)
def test_k15_regular_expressions_that_hang(options, monkeypatch):
    monkeypatch.setattr("component.adapter_config.MATCH_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"SOURCE: adapter_config\.json has a regular expression that takes too long"):
        check_patterns(LoraConfig(**options), NAMES, "SOURCE")
    assert time.monotonic() - start < 5


def test_k15_an_invalid_regular_expression():
    with pytest.raises(UserError, match=r"invalid regular expression, one of '\(' .*unterminated subpattern"):
        check_patterns(LoraConfig(target_modules="("), NAMES, "SOURCE")


@pytest.mark.parametrize("pattern", [r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj", ".*proj$", "all-linear"])
def test_usual_regular_expressions(pattern):
    check_patterns(LoraConfig(target_modules=pattern), NAMES, "SOURCE")
