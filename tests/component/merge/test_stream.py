"""The adapter on its base and the merged model, run a part of a weight at a time, as PEFT and transformers do."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip

from component.error import UserError
from component.merge import pair as merge_pair
from component.merge.pair import Difference
from component.merge.plan import plan_merge
from component.merge.stream import HIDDEN, _comparing, can_stream, run_both
from component.merge.write import write_merged
from component.model import load_config
from component.rope import extend_context
from tests.component.merge.test_write import (
    ADAPTERS,
    DORA,
    TIED,
    in_bin,
    in_bin_shards,
    process_bytes,
    save_wide_adapter,
)  # fmt: skip
from tests.merging import original, save_adapter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POSITIONS = torch.stack([torch.arange(20), torch.arange(236, 256)])
LAYER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
TENSORS = [
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    *(f"model.layers.1.{name}.weight" for name in LAYER),
]  # fmt: skip


class Merge:
    """A merged folder, and all that it was merged from; the context is four times as long as the base's."""

    def __init__(self, folder: Path, base: Path, adapter: Path, dtype=torch.float32, kind="fp16", rope_type="linear"):
        self.folder, self.base, self.adapter = folder, base, adapter
        self.config = load_config(str(base))
        extend_context(self.config, 256, rope_type)
        self.plan = plan_merge(str(base), str(adapter), self.config, dtype=dtype, base_weights=kind)
        folder.mkdir()
        write_merged(folder, self.plan)

    def compare(self):
        ids = torch.arange(40).reshape(2, 20) * 9 % 384
        return run_both(self.folder, self.plan, str(self.adapter), self.config, ids, POSITIONS, 8e-2)

    def wrong(self) -> list[str]:
        return [name for name, difference in self.compare()[0].items() if not difference.is_rounding]

    def wrong_tensors(self) -> list[str]:
        return [name for name in self.wrong() if HIDDEN not in name]

    @torch.no_grad()
    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the adapter on its base and of the merged model, loaded by PEFT and transformers."""
        ids = torch.arange(40).reshape(2, 20) * 9 % 384
        found = []
        for place, config, adapter in ((self.base, self.config, self.adapter), (self.folder, None, None)):
            config = config or AutoConfig.from_pretrained(place)
            model = AutoModelForCausalLM.from_pretrained(place, config=config, dtype=torch.float32)
            model = PeftModel.from_pretrained(model, adapter) if adapter else model
            found.append(model.eval()(input_ids=ids, position_ids=POSITIONS, use_cache=False).logits)
        return found[0], found[1]


def plant(folder: Path, name: str, place: tuple = (...,)) -> None:
    """Add noise of 1 % of a tensor's Frobenius norm, all of it in a part of the tensor."""
    weights = load_file(folder / "model.safetensors")
    old = weights[name].float()
    noise = torch.zeros_like(old)
    noise[place] = torch.randn_like(noise[place])
    weights[name] = (old + 0.01 * noise * old.norm() / noise.norm()).to(weights[name].dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ---- the same as whole models


CASES = {
    **{name: (options, False) for name, options in ADAPTERS.items()},
    **{f"dora-{name}": ({"use_dora": True, **options}, False) for name, options in DORA.items()},
    **{f"tied-{name}": (options, True) for name, (options, _) in TIED.items()},
}


@pytest.mark.filterwarnings("ignore:Model (with|has)")
@pytest.mark.parametrize("part", [150, pytest.param(2**22, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_whole_models_compute(bases, tmp_path, monkeypatch, name, part):
    """An honest merge passes, and logits equal those of whole models, also with few rows of a weight in memory."""
    monkeypatch.setattr(merge_pair, "PART", part)
    options, tied = CASES[name]
    save_adapter(tmp_path / "adapter", bases(tied), **options)
    merge = Merge(tmp_path / "merged", bases(tied), tmp_path / "adapter")
    found, ours, theirs = merge.compare()
    assert [name for name, difference in found.items() if not difference.is_rounding] == []
    expected_ours, expected_theirs = merge.whole()
    scale = float(expected_ours.abs().max())
    assert_close(ours, expected_ours, atol=2e-5 * scale, rtol=1e-4)
    assert_close(theirs, expected_theirs, atol=2e-5 * scale, rtol=1e-4)
    assert set(load_file(merge.folder / "model.safetensors")) <= found.keys()  # nothing is left out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["fp16", "nf4"])
@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_honest_merges_pass(bases, tmp_path, config_class, kind, dtype):
    save_adapter(tmp_path / "adapter", bases(config_class=config_class), modules_to_save=["norm", "input_layernorm"])
    merge = Merge(tmp_path / "merged", bases(config_class=config_class), tmp_path / "adapter", dtype, kind)
    assert merge.wrong() == []


@pytest.mark.parametrize("of_base", DTYPES)
@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_bases_and_rotary_embeddings(bases, tmp_path, rope_type, of_base):
    base = bases(dtype=of_base)
    save_adapter(tmp_path / "adapter", base, use_dora=True, modules_to_save=["embed_tokens"])
    merge = Merge(tmp_path / "merged", base, tmp_path / "adapter", torch.float16, rope_type=rope_type)
    assert merge.wrong() == []


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"bias": "lora_only"}], ids=["none", "all", "lora_only"])
def test_biases(bases, tmp_path, options):
    save_adapter(tmp_path / "adapter", bases(config_class=Qwen2Config), **options)
    merge = Merge(tmp_path / "merged", bases(config_class=Qwen2Config), tmp_path / "adapter")
    assert merge.wrong() == []
    plant(merge.folder, "model.layers.0.self_attn.k_proj.bias")
    assert merge.wrong_tensors() == ["model.layers.0.self_attn.k_proj.bias"]


@pytest.mark.parametrize("save", [in_bin, in_bin_shards])
def test_bases_in_bin_files(bases, tmp_path, save, monkeypatch):
    monkeypatch.setattr(merge_pair, "PART", 150)
    save(bases(), tmp_path / "base")
    save_adapter(tmp_path / "adapter", bases())
    assert Merge(tmp_path / "merged", tmp_path / "base", tmp_path / "adapter").wrong() == []


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_originals_files(bases, tmp_path, tied):
    original(tmp_path / "original", bases(tied), "base_model.model.")
    assert Merge(tmp_path / "merged", bases(tied), tmp_path / "original").wrong() == []


@torch.no_grad()
def test_three_texts_and_their_hidden_states(bases, tmp_path):
    """Both halves of the batch are whole, and each layer's output is compared."""
    save_adapter(tmp_path / "adapter", bases())
    merge = Merge(tmp_path / "merged", bases(), tmp_path / "adapter", torch.float16)
    ids, places = torch.arange(60).reshape(3, 20) * 7 % 384, torch.arange(60).reshape(3, 20) * 4
    found, ours, theirs = run_both(merge.folder, merge.plan, str(merge.adapter), merge.config, ids, places, 8e-2)
    states = []
    for place, adapter, result in ((merge.base, merge.adapter, ours), (merge.folder, None, theirs)):
        config = merge.config if adapter else AutoConfig.from_pretrained(place)
        model = AutoModelForCausalLM.from_pretrained(place, config=config, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapter) if adapter else model
        outputs = model.eval()(input_ids=ids, position_ids=places, use_cache=False, output_hidden_states=True)
        assert_close(result, outputs.logits, atol=2e-5 * float(outputs.logits.abs().max()), rtol=1e-4)
        states.append(outputs.hidden_states[1])
    assert found["model.layers.0.self_attn.q_proj.weight"].kind == "q_proj"
    compared = [difference for name, difference in found.items() if name.startswith(HIDDEN)]
    assert [difference.bound for difference in compared] == [8e-2, 8e-2]
    relative = float((states[1] - states[0]).norm() / states[0].norm())
    assert 1e-5 < relative < 1e-2
    assert compared[0].relative == pytest.approx(relative, rel=1e-2)


def test_layers_that_return_more_than_hidden_states():
    difference = Difference(HIDDEN, bound=0.1)
    _comparing(difference)(None, (), (torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0])))
    assert difference.relative == pytest.approx(1 / 3)


# ---- what differs is named


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TENSORS)
def test_noise_of_1_percent_is_named(bases, tmp_path, name, dtype):
    save_adapter(tmp_path / "adapter", bases(), modules_to_save=["norm"])
    merge = Merge(tmp_path / "merged", bases(), tmp_path / "adapter", dtype)
    plant(merge.folder, name)
    found, _, _ = merge.compare()
    assert [key for key, each in found.items() if not each.is_rounding and HIDDEN not in key] == [name]
    assert found[name].relative == pytest.approx(0.01, rel=0.3)


@pytest.mark.parametrize("place", [(3, 5), (3,), (slice(None), 5)], ids=["element", "row", "column"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_noise_in_one_place_is_named(bases, tmp_path, monkeypatch, name, place):
    monkeypatch.setattr(merge_pair, "PART", 1000)
    save_adapter(tmp_path / "adapter", bases())
    merge = Merge(tmp_path / "merged", bases(), tmp_path / "adapter", torch.bfloat16)
    plant(merge.folder, name, place)
    assert merge.wrong_tensors() == [name]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["lm_head", "v_proj", "embed_tokens"]}])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight"])
@pytest.mark.parametrize(("tied", "kind"), [(True, "fp16"), (False, "nf4")])
def test_noise_in_other_merges_is_named(bases, tmp_path, tied, kind, name, options):
    save_adapter(tmp_path / "adapter", bases(tied), **options)
    merge = Merge(tmp_path / "merged", bases(tied), tmp_path / "adapter", torch.float16, kind)
    plant(merge.folder, name)
    assert merge.wrong_tensors() == [name]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_named(bases, tmp_path, value):
    save_adapter(tmp_path / "adapter", bases())
    merge = Merge(tmp_path / "merged", bases(), tmp_path / "adapter")
    weights = load_file(merge.folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3, 5] = value
    save_file(weights, merge.folder / "model.safetensors", metadata={"format": "pt"})
    assert merge.wrong_tensors() == ["model.layers.0.mlp.down_proj.weight"]


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_another_rope_factor_is_named(bases, tmp_path):
    save_adapter(tmp_path / "adapter", bases())
    merge = Merge(tmp_path / "merged", bases(), tmp_path / "adapter")
    parameters = json.loads((merge.folder / "config.json").read_text())["rope_parameters"]
    wrong = parameters | {"factor": 3.9}
    change_config(merge.folder, rope_parameters=wrong, rope_scaling=wrong)  # transformers reads the latter first
    assert merge.wrong_tensors() == ["rope_parameters in config.json"]


@pytest.mark.parametrize("what", ["missing", "shape"])
def test_weights_that_the_config_does_not_have(bases, tmp_path, what):
    save_adapter(tmp_path / "adapter", bases())
    merge = Merge(tmp_path / "merged", bases(), tmp_path / "adapter")
    weights = load_file(merge.folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weight = weights.pop(name)
    if what == "shape":
        weights[name] = weight[1:].clone()
    save_file(weights, merge.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"has no {name} of shape \(64, 128\)"):
        merge.compare()


# ---- memory, and other models


def test_memory_is_that_of_a_part_not_of_the_model(tmp_path):
    """120 MB of weights in fp16, twice as much in fp32, and as much again for the other model."""
    config = LlamaConfig(vocab_size=384, hidden_size=1024, intermediate_size=2816, num_hidden_layers=5)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "base")
    save_wide_adapter(tmp_path / "adapter", tmp_path / "base")
    merge = Merge(tmp_path / "merged", tmp_path / "base", tmp_path / "adapter", torch.float16)
    assert merge.plan.size > 120e6
    merge.compare()  # libraries allocate buffers at first use
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = process_bytes("VmRSS")
    assert merge.wrong() == []
    assert process_bytes("VmHWM") - before < 60e6


def test_bytes_in_memory_do_not_depend_on_the_size_of_the_weights(bases, tmp_path, monkeypatch):
    """No more than a part of a weight, of its LoRA and of a bias at a time."""
    monkeypatch.setattr(merge_pair, "PART", 1000)
    save_adapter(tmp_path / "adapter", bases())
    merge = Merge(tmp_path / "merged", bases(), tmp_path / "adapter")
    sizes = []
    call = merge_pair.functional_call

    def counted(module, weights, inputs):
        sizes.append(sum(weight.numel() for weight in weights.values()))
        return call(module, weights, inputs)

    monkeypatch.setattr(merge_pair, "functional_call", counted)
    assert merge.wrong() == []
    assert 900 < max(sizes) < 1000 + 4 * 128 + 4 * 15
    assert sum(sizes) > 2 * merge.plan.parameters


TINY = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [(LlamaConfig(**TINY), True), (MistralConfig(**TINY), True), (Qwen2Config(**TINY), True),
     (Qwen3Config(**TINY), True), (Phi3Config(**TINY), True), (CohereConfig(**TINY, use_qk_norm=True), False),
     (GptOssConfig(**TINY, num_local_experts=2), False)],
    ids=lambda value: getattr(value, "model_type", str(value)),
)  # fmt: skip
def test_which_models_are_compared_by_tensor(config, expected):
    assert can_stream(config) == expected
