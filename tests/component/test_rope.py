"""Rotary scaling: the cos and sin tables of a stock Llama with an extended config, and saved configs."""

import copy
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging as transformers_logging

from component.error import UserError
from component.rope import (
    THETA,
    context_length,
    depends_on_length,
    extend_context,
    forget_lengths,
    ntk_theta,
    original_context,
    own_rope_type,
    rope_factor,
    scaling,
    scaling_warnings,
)

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama2(**changes) -> LlamaConfig:
    return LlamaConfig(**{"max_position_embeddings": 4096, **changes})


def llama31() -> LlamaConfig:
    return llama2(max_position_embeddings=131072, rope_parameters=dict(LLAMA3_SCALING))


@pytest.fixture
def log(monkeypatch):
    """All warnings of transformers, including `warning_once` ones already issued in this process."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = transformers_logging.get_logger("transformers")
    logging.Logger.warning_once.cache_clear()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def tables(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, head_dim), computed by a stock Llama."""
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    return cos[0], sin[0]


def expected_tables(positions: Tensor, factor: float, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of p/factor * theta^(-2i/d), in double precision (arXiv 2306.15595, section 2.2)."""
    frequencies = torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)
    angles = positions.double()[:, None] / factor * frequencies
    return torch.cat((angles.cos(),) * 2, dim=-1), torch.cat((angles.sin(),) * 2, dim=-1)


# Linear position interpolation


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    ("target", "factor"), [(4096, 1.0), (4097, 2.0), (6000, 2.0), (8192, 2.0), (10000, 3.0), (32768, 8.0)]
)
def test_linear_tables_equal_the_formula(theta, target, factor):
    config = llama2(rope_parameters={"rope_type": "default", "rope_theta": theta})
    assert extend_context(config, target) == factor
    positions = torch.arange(target)
    # fp32 represents angles of up to 4096 to about 5e-4
    for mine, theirs in zip(tables(config, positions), expected_tables(positions, factor, theta, 128), strict=True):
        assert_close(mine.double(), theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_linear_tables_equal_the_unscaled_model_at_p_over_factor(factor):
    config = llama2()
    unscaled = tables(config, torch.arange(4096))
    assert extend_context(config, 4096 * factor) == factor
    extended = tables(config, torch.arange(0, 4096 * factor, factor))
    assert torch.equal(extended[0], unscaled[0])
    assert torch.equal(extended[1], unscaled[1])
    assert not torch.equal(tables(config, torch.arange(4096))[0], unscaled[0])


@pytest.mark.parametrize(
    ("original", "target", "factor"),
    [
        (4096, 6000, 2.0),
        (4096, 8192, 2.0),
        (4096, 8193, 3.0),
        (2048, 131072, 64.0),
        (8192, 12288, 2.0),
        (64, 100, 2.0),
    ],
)
def test_factor_is_rounded_up(original, target, factor):
    config = llama2(max_position_embeddings=original)
    result = extend_context(config, target)
    assert result == factor
    assert isinstance(result, float)
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": factor}
    assert config.max_position_embeddings == original


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("target", [1, 2048, 4095, 4096])
def test_covered_target_does_not_change_the_config(target, rope_type):
    config = llama2()
    before = copy.deepcopy(config.to_dict())
    assert extend_context(config, target, rope_type) == 1.0
    assert config.to_dict() == before


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("model", [llama2, llama31])
def test_extending_twice_changes_nothing(model, rope_type):
    config = model()
    rope_type = rope_type if model is llama2 else "llama3"
    factor = extend_context(config, 262144, rope_type)
    before = copy.deepcopy(config.to_dict())
    assert extend_context(config, 262144, rope_type) == factor
    assert config.to_dict() == before


@pytest.mark.parametrize("first", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("second", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize(("target", "factor"), [(8192, 4.0), (30000, 8.0), (65536, 16.0)])
def test_extending_an_extended_config_is_absolute(first, second, target, factor):
    """And never scales it less than before."""
    config, fresh = llama2(), llama2()
    assert extend_context(config, 16384, first) == 4.0
    assert extend_context(config, target, second) == factor
    extend_context(fresh, max(target, 16384), second)
    assert config.to_dict() == fresh.to_dict()  # the first scaling is fully replaced


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_target_below_the_original_does_not_change_an_extended_config(rope_type):
    config = llama2()
    extend_context(config, 16384, rope_type)
    before = copy.deepcopy(config.to_dict())
    extend_context(config, 2048)
    assert config.to_dict() == before


def test_lengths_of_a_config():
    config = llama2()
    assert (original_context(config), rope_factor(config), context_length(config)) == (4096, 1.0, 4096)
    extend_context(config, 10000)
    assert (original_context(config), rope_factor(config), context_length(config)) == (4096, 3.0, 12288)
    extend_context(config, 10000, "yarn")
    assert (original_context(config), rope_factor(config), context_length(config)) == (4096, 3.0, 12288)
    assert (original_context(llama31()), rope_factor(llama31()), context_length(llama31())) == (8192, 8.0, 131072)


def test_length_of_a_llama3_scaling_is_not_its_factor():
    """Llama 3.2: factor 32, original 8192, yet 131072 tokens; the factor applies to the lowest frequencies only."""
    config = llama2(max_position_embeddings=131072, rope_parameters={**LLAMA3_SCALING, "factor": 32.0})
    assert context_length(config) == 131072
    assert extend_context(config, 131072) == 32.0
    assert config.rope_parameters["rope_type"] == "llama3"


# Models with another rope_theta or a scaling of their own


@pytest.mark.parametrize("target", [8192, 8193, 65536, 100000, 131072])
def test_llama3_scaling_that_covers_the_target_is_kept(target):
    config = llama31()
    before = copy.deepcopy(config.to_dict())
    assert extend_context(config, target) == 8.0
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("positions", "factor", "target", "raised", "covered"),
    [(131072, 8.0, 262144, 16.0, 262144), (131072, 32.0, 131073, 64.0, 262144), (16384, 8.0, 40000, 24.0, 49152)],
)
def test_k5a_llama3_is_extended_by_its_own_factor(positions, factor, target, raised, covered, log):
    before = llama2(max_position_embeddings=positions, rope_parameters={**LLAMA3_SCALING, "factor": factor})
    config = copy.deepcopy(before)
    assert extend_context(config, target, own_rope_type(config)) == raised
    assert config.rope_parameters == {**LLAMA3_SCALING, "factor": raised}
    assert context_length(config) == config.max_position_embeddings == covered
    config.validate_rope()
    assert log == []
    # frequencies with more than 4 turns in 8192 tokens stay, those with less than one move with the context
    old, new = LlamaRotaryEmbedding(before).inv_freq, LlamaRotaryEmbedding(config).inv_freq
    wavelengths = 2 * torch.pi * 500000.0 ** (torch.arange(0, 128, 2) / 128)
    assert torch.equal(new[wavelengths < 2048], old[wavelengths < 2048])
    slow = wavelengths > 8192
    assert slow.sum() > 10
    assert_close(old[slow] / new[slow], torch.full_like(old[slow], raised / factor))
    assert scaling_warnings(before, config, target, None) == []


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_k5a_llama3_is_not_replaced(rope_type):
    config = llama31()
    before = copy.deepcopy(config.to_dict())
    with pytest.raises(UserError, match=rf"rope_type: {rope_type} .*leave rope_type out"):
        extend_context(config, 262144, rope_type)
    assert config.to_dict() == before


@pytest.mark.parametrize(("target", "factor"), [(1024, 4.0), (2048, 4.0), (4096, 4.0), (4097, 5.0), (8192, 8.0)])
@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_k5b_a_linear_config_is_never_scaled_less(target, factor, rope_type):
    """1024 tokens, factor 4: trained at 256 x 4, or at 1024; the config does not say."""
    before = llama2(
        max_position_embeddings=1024, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    )
    config = copy.deepcopy(before)
    assert extend_context(config, target, rope_type) == factor
    found = " ".join(scaling_warnings(before, config, target, None))
    assert ('"original_max_position_embeddings": 256' in found) == (target > 1024)
    assert ("yarn x" in found) == (target > 1024 and rope_type == "yarn")


def test_k5b_a_linear_config_that_says_its_original_length():
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
    before = llama2(max_position_embeddings=1024, rope_parameters=scaled)
    config = copy.deepcopy(before)
    assert context_length(config) == 1024
    assert extend_context(config, 2048) == 8.0
    assert config.rope_parameters == {**scaled, "factor": 8.0}
    assert extend_context(config, 2048) == 8.0
    assert context_length(config) == 2048
    assert scaling_warnings(before, config, 2048, None) == []


def longrope(**more) -> Phi3Config:
    scaled = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 48,
        "long_factor": [2.0] * 48,
        **more,
    }
    return Phi3Config(max_position_embeddings=131072, original_max_position_embeddings=4096, rope_parameters=scaled)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        (longrope(), 32.0),
        (llama2(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}), 1.0),
        (llama2(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4, "factor": 4.0}), 4.0),
    ],
    ids=["longrope", "proportional", "proportional x 4"],
)
def test_k5_other_trained_scalings_are_not_replaced(config, factor):
    longest = config.max_position_embeddings
    before = copy.deepcopy(config.to_dict())
    assert extend_context(config, longest, own_rope_type(config)) == factor
    for rope_type in ("linear", "yarn", own_rope_type(config)):
        with pytest.raises(UserError, match=rf"model_max_length: {longest + 1} tokens.*use at most {longest}"):
            extend_context(config, longest + 1, rope_type)
    assert config.to_dict() == before


def test_k5_yarn_keeps_its_other_parameters():
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6}
    scaled |= {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
    config = llama2(max_position_embeddings=16384, rope_parameters=dict(scaled))
    assert extend_context(config, 16384, "yarn") == 4.0
    assert (config.rope_parameters, config.max_position_embeddings) == (scaled, 16384)
    assert extend_context(config, 32768, "yarn") == 8.0
    assert config.rope_parameters == {**scaled, "factor": 8.0}


def test_k5_yarn_without_a_factor():
    """transformers then takes max_position_embeddings / original_max_position_embeddings."""
    scaled = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096, "rope_theta": 1e6}
    config = llama2(max_position_embeddings=16384, rope_parameters=scaled)
    assert (rope_factor(config), context_length(config)) == (4.0, 16384)
    assert extend_context(config, 20000, "yarn") == 5.0


@pytest.mark.parametrize(
    ("asked", "target", "words"),
    [(None, 65536, []), ("linear", 65536, ["rope_type: linear has no effect", "llama3 x 8"])],
)
def test_k5_a_rope_type_without_effect_is_told(asked, target, words):
    config = llama31()
    extend_context(config, target, asked or own_rope_type(config))
    found = " ".join(scaling_warnings(llama31(), config, target, asked))
    assert bool(found) == bool(words)
    assert all(word in found for word in words)


def test_scaling_in_words():
    assert [str(scaling(config)) for config in (llama2(), llama31())] == ["unscaled", "llama3 x 8"]
    assert scaling(llama31()).context == 131072


def dynamic_logits(lengths: list[int], config: LlamaConfig) -> list[Tensor]:
    """Logits of rows of `lengths` tokens, one forward pass each, by one model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    forget_lengths(model)
    with torch.no_grad():
        return [model(torch.arange(length)[None]).logits for length in lengths]


@pytest.mark.parametrize("length", [40, 64, 65, 100])
def test_k5c_dynamic_scaling_forgets_earlier_rows(tiny_llama_config, length):
    extend_context(tiny_llama_config, 256, "dynamic")
    alone = dynamic_logits([length], tiny_llama_config)[0]
    assert torch.equal(dynamic_logits([250, length], tiny_llama_config)[1], alone)
    stock = LlamaForCausalLM(tiny_llama_config)
    with torch.no_grad():
        stock(torch.arange(250)[None])
    changed = stock.model.rotary_emb.inv_freq
    fresh = LlamaRotaryEmbedding(tiny_llama_config).inv_freq
    assert not torch.equal(changed, fresh)  # the state that is forgotten


def test_which_scalings_depend_on_length():
    config = llama2()
    assert not depends_on_length(config, 8192)
    extend_context(config, 8192, "dynamic")
    assert [depends_on_length(config, tokens) for tokens in (4096, 4097)] == [False, True]
    assert [depends_on_length(longrope(), tokens) for tokens in (4096, 4097)] == [False, True]


def test_llama3_without_scaling_keeps_its_theta():
    config = llama2(max_position_embeddings=8192, rope_theta=500000.0)
    assert extend_context(config, 32768) == 4.0
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}


@pytest.mark.parametrize(("own", "kept"), [("default", "linear"), ("linear", "linear"), ("yarn", "yarn")])
def test_an_extended_model_keeps_its_rope_type(own, kept):
    config = llama2()
    if own != "default":
        extend_context(config, 16384, own)
    assert own_rope_type(config) == kept


def test_a_trained_scaling_is_the_models_own():
    assert own_rope_type(llama31()) == "llama3"


@pytest.mark.parametrize("max_positions", [4096, 16384])  # both occur: the length before and after scaling
def test_original_length_of_published_yarn_configs(max_positions):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6}
    config = llama2(max_position_embeddings=max_positions, rope_parameters=scaling)
    assert extend_context(config, 30000) == 8.0
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(max_position_embeddings=32768, rope_theta=1e6),
        Qwen2Config(max_position_embeddings=32768, rope_theta=1e6),
        Qwen3Config(max_position_embeddings=32768, rope_theta=1e6),
        Phi3Config(max_position_embeddings=32768, original_max_position_embeddings=32768, rope_theta=1e6),
    ],
    ids=lambda config: config.model_type,
)
def test_other_models_of_the_family(config):
    assert extend_context(config, 131072) == 4.0
    parameters = dict(config.rope_parameters)
    parameters.pop("partial_rotary_factor", None)  # part of the architecture
    assert parameters == {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
    assert config.max_position_embeddings == 32768


# On disk


def write_config(folder, **changes) -> None:
    """config.json as transformers 4 wrote it for LLaMA2-7B; `None` leaves a key out."""
    keys = {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": "null",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "vocab_size": 32000,
    }
    keys |= changes
    keys = {key: None if value == "null" else value for key, value in keys.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(keys, indent=2) + "\n")


@pytest.mark.parametrize("theta", [None, 10000.0, 1e6])
def test_config_of_the_original_project(tmp_path, theta):
    """It wrote `config.rope_scaling = {"type": "linear", "factor": …}` and left max_position_embeddings alone."""
    write_config(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=theta)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (original_context(config), rope_factor(config), context_length(config)) == (4096, 2.0, 8192)
    before = copy.deepcopy(config.to_dict())
    assert extend_context(config, 8192) == 2.0
    positions = torch.arange(8192)
    for mine, theirs in zip(
        tables(config, positions), expected_tables(positions, 2.0, theta or 10000.0, 128), strict=True
    ):
        assert_close(mine.double(), theirs, atol=1e-3, rtol=0)
    after = copy.deepcopy(config.to_dict())
    for kept in (before, after):
        kept["rope_parameters"].pop("type", None)  # old key beside the new one; harmless
    assert after == before

    assert extend_context(config, 16384) == 4.0
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": theta or 10000.0, "factor": 4.0}
    assert config.max_position_embeddings == 4096


def test_unscaled_config_of_transformers_4(tmp_path):
    write_config(tmp_path, rope_theta=1e6)
    config = AutoConfig.from_pretrained(tmp_path)
    assert extend_context(config, 8192) == 2.0
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}


SCALED = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 3.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("rope_type", SCALED)
def test_saved_config_round_trip(tmp_path, tiny_llama_config, rope_type, log):
    assert extend_context(tiny_llama_config, 180, rope_type) == 3.0
    tiny_llama_config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_parameters"] == SCALED[rope_type]
    assert written["max_position_embeddings"] == 64
    assert "rope_scaling" not in written
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LlamaConfig
    assert loaded.rope_parameters == SCALED[rope_type]
    assert loaded.max_position_embeddings == 64
    positions = torch.arange(192)
    for mine, theirs in zip(tables(loaded, positions), tables(tiny_llama_config, positions), strict=True):
        assert torch.equal(mine, theirs)
    before = copy.deepcopy(loaded.to_dict())
    assert extend_context(loaded, 180, rope_type) == 3.0
    assert loaded.to_dict() == before
    assert log == []


@pytest.mark.parametrize("rope_type", SCALED)
def test_model_runs_at_its_extended_length(tiny_llama_config, rope_type, log):
    extend_context(tiny_llama_config, 180, rope_type)
    model = LlamaForCausalLM(tiny_llama_config).eval()
    with torch.no_grad():
        logits = model(torch.randint(2, 384, (1, 192))).logits
    assert logits.shape == (1, 192, 384)
    assert logits.isfinite().all()
    assert log == []


def test_log_fixture_records_warnings(log):
    llama2(rope_parameters={**SCALED["yarn"], "original_max_position_embeddings": 1000, "surplus": 1})
    assert any("surplus" in message for message in log)
    assert any("implicit factor" in message for message in log)


LOAD_IN_STOCK_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        print(model(torch.arange(192)[None]).logits.double().abs().sum().item())
assert "component" not in sys.modules
"""


def test_saved_models_load_without_longqlora_code(tmp_path, tiny_llama_config):
    folders, expected = [], []
    for rope_type in SCALED:
        config = copy.deepcopy(tiny_llama_config)
        extend_context(config, 180, rope_type)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            expected.append(model(torch.arange(192)[None]).logits.double().abs().sum().item())
        folders.append(str(tmp_path / rope_type))
        model.save_pretrained(folders[-1])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", LOAD_IN_STOCK_TRANSFORMERS, *folders],
        cwd=tmp_path,
        env=environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert [float(line) for line in ran.stdout.split()] == pytest.approx(expected, rel=1e-6)
    assert "rope" not in ran.stderr.lower()


# The other two rope types


def test_dynamic_scales_only_beyond_the_original_length():
    config, unscaled = llama2(), tables(llama2(), torch.arange(4096))
    extend_context(config, 8192, "dynamic")
    assert torch.equal(tables(config, torch.arange(4096))[0], unscaled[0])
    # NTK-aware base at length L: theta * (factor * L/original - (factor - 1)) ** (d / (d - 2))
    positions = torch.arange(8192)
    theta = 10000.0 * (2.0 * 8192 / 4096 - 1.0) ** (128 / 126)
    for mine, theirs in zip(tables(config, positions), expected_tables(positions, 1.0, theta, 128), strict=True):
        assert_close(mine.double(), theirs, atol=2e-3, rtol=0)


def test_yarn_scales_low_frequencies_and_keeps_high_ones():
    plain, config = llama2(), llama2()
    extend_context(config, 16384, "yarn")
    before, after = LlamaRotaryEmbedding(plain).inv_freq, LlamaRotaryEmbedding(config).inv_freq
    ratio = before / after
    # frequencies with over 32 turns in 4096 tokens are kept, those below one turn are divided by 4
    turns = 4096 * before / (2 * torch.pi)
    assert_close(ratio[turns > 35], torch.ones_like(ratio[turns > 35]))
    assert_close(ratio[turns < 0.85], torch.full_like(ratio[turns < 0.85], 4.0))
    assert (ratio[1:] >= ratio[:-1] - 1e-6).all()


# A raised base frequency


@pytest.mark.parametrize(
    ("rope_type", "scaled"),
    [
        (THETA, {"rope_type": "default"}),
        ("linear", {"rope_type": "linear", "factor": 3.0}),
        ("dynamic", {"rope_type": "dynamic", "factor": 3.0}),
        ("yarn", {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 4096}),
    ],
)
def test_a_raised_theta_is_written(rope_type, scaled, log, tmp_path):
    """Alone or with a scaling; extending twice changes nothing, also after the config was saved and loaded."""
    config = llama2()
    assert extend_context(config, 9000, rope_type, rope_theta=500000) == 3.0
    assert config.rope_parameters == {**scaled, "rope_theta": 500000.0}
    assert config.max_position_embeddings == 4096
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == {**scaled, "rope_theta": 500000.0}
    assert extend_context(again, 9000, rope_type, rope_theta=500000.0) == 3.0
    assert again.rope_parameters == config.rope_parameters
    assert again.max_position_embeddings == 4096
    assert log == []


@pytest.mark.parametrize(("rope_type", "factor"), [(THETA, 1.0), ("linear", 3.0)])
def test_tables_with_a_raised_theta_equal_the_formula(rope_type, factor):
    config = llama2()
    extend_context(config, 9000, rope_type, rope_theta=500000.0)
    positions = torch.arange(9000)
    expected = expected_tables(positions, factor, 500000.0, 128)
    for mine, theirs in zip(tables(config, positions), expected, strict=True):
        assert_close(mine.double(), theirs, atol=2e-3, rtol=0)


def test_ntk_aware_theta():
    """The slowest rotation is slowed by the growth, the fastest not at all."""
    config = llama2()
    theta = ntk_theta(config, 4.0)
    assert theta == pytest.approx(10000.0 * 4.0 ** (128 / 126), rel=1e-12)
    before = LlamaRotaryEmbedding(config).inv_freq
    extend_context(config, 16384, THETA, rope_theta=theta)
    ratio = before / LlamaRotaryEmbedding(config).inv_freq
    assert (ratio[0].item(), ratio[-1].item()) == pytest.approx((1.0, 4.0), rel=1e-5)
    half = llama2(rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5})
    assert ntk_theta(half, 3.0) == pytest.approx(100.0 * 3.0 ** (64 / 62), rel=1e-12)
    extend_context(half, 8192, THETA, rope_theta=200.0)
    assert half.rope_parameters == {"rope_type": "default", "rope_theta": 200.0, "partial_rotary_factor": 0.5}


def test_a_covered_target_raises_no_theta():
    for rope_type in (THETA, "linear"):
        before, config = llama2(), llama2()
        assert extend_context(config, 4096, rope_type, rope_theta=5e5) == 1.0
        assert config.to_dict() == before.to_dict()
        (warning,) = (text for text in scaling_warnings(before, config, 4096, None, 5e5))
        assert warning == "rope_theta has no effect: the base covers 4096 tokens, unscaled"
        assert scaling_warnings(before, config, 4096, THETA, 5e5) == [warning]


def test_warnings_about_a_raised_theta():
    before, config = llama2(), llama2()
    extend_context(config, 8192, THETA, rope_theta=5e5)
    assert scaling_warnings(before, config, 8192, THETA, 5e5) == []
    config = llama2()
    extend_context(config, 8192, THETA, rope_theta=1e4)
    expected = ["rope_theta: 10000 is the base's own, so nothing is raised"]
    assert scaling_warnings(before, config, 8192, THETA, 1e4) == expected


@pytest.mark.parametrize(
    ("rope_type", "theta", "message"),
    [
        (THETA, None, r"^rope_type: theta needs rope_theta, above the base's own 10000; .* factor 2 is 20221$"),
        (THETA, 9999.0, r"^rope_theta: 9999 is less than the base's own 10000.*factor 2 is 20221"),
        ("linear", 0.0, r"^rope_theta: 0 is less than"),
        ("yarn", -5e5, r"^rope_theta: -500000 is less than"),
        ("linear", float("nan"), r"^rope_theta: nan is less than"),
        ("linear", float("inf"), r"^rope_theta: inf is"),
    ],
)
def test_refused_thetas(rope_type, theta, message):
    config = llama2()
    with pytest.raises(UserError, match=message):
        extend_context(config, 8192, rope_type, rope_theta=theta)
    assert config.to_dict() == llama2().to_dict()


def test_a_scaled_base_is_not_unscaled_by_theta():
    config = llama2()
    extend_context(config, 8192)
    with pytest.raises(UserError, match=r"^rope_type: theta leaves positions unscaled, but the base is scaled linear"):
        extend_context(config, 16384, THETA, rope_theta=5e5)
    assert extend_context(config, 16384, "linear", rope_theta=5e5) == 4.0
    assert config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}


def test_the_theta_of_a_llama3_scaling_is_not_raised():
    for rope_type, theta in (("llama3", 1e6), (THETA, 1e6)):
        with pytest.raises(
            UserError, match=r"^rope_theta: 1e\+06 would change .*llama3 scaling; leave rope_theta out"
        ):
            extend_context(llama31(), 262144, rope_type, rope_theta=theta)
    with pytest.raises(UserError, match=r"^rope_type: theta would replace the llama3 scaling"):
        extend_context(llama31(), 262144, THETA)


# User errors


@pytest.mark.parametrize(
    ("rope_type", "meant"), [("liner", "linear"), ("Linear", "linear"), ("yarm", "yarn"), ("dynamics", "dynamic")]
)
def test_unknown_rope_type_suggests_the_nearest(rope_type, meant):
    config = llama2()
    before = copy.deepcopy(config.to_dict())
    with pytest.raises(UserError, match=rf"rope_type.*'{rope_type}'.*did you mean {meant}\?"):
        extend_context(config, 8192, rope_type)
    assert config.to_dict() == before


@pytest.mark.parametrize("rope_type", ["default", "llama3", "longrope", "", "xyz"])
def test_unsupported_rope_types_are_rejected(rope_type):
    with pytest.raises(UserError, match=r"linear.*dynamic.*yarn"):
        extend_context(llama2(), 8192, rope_type)


@pytest.mark.parametrize("target", [0, -4096])
def test_lengths_below_one_are_rejected(target):
    with pytest.raises(UserError, match=str(target)):
        extend_context(llama2(), target)


@pytest.mark.parametrize("config", [GPT2Config(), Gemma3TextConfig()], ids=lambda config: config.model_type)
def test_models_without_one_rotary_embedding_are_rejected(config):
    before = copy.deepcopy(config.to_dict())
    with pytest.raises(UserError, match=config.model_type):
        extend_context(config, 1 << 20)
    assert config.to_dict() == before
