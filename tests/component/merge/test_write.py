"""How is an adapter merged into its base? Bit-identical to PEFT, for all kinds of adapters, bases and files."""

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from component.error import UserError
from component.merge.plan import plan_merge
from component.merge.write import Scratch, merged_tensor, nf4_round_trip, write_merged
from component.model import load_base, load_config
from tests.merging import LINEAR, assert_same, copied, merged, original, save_adapter

CPU = torch.device("cpu")
PATTERNS = {
    "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2},
    "alpha_pattern": {"v_proj": 32, "model.layers.0.mlp.down_proj": 1},
}
ADAPTERS = {
    "lora": {},
    "some-layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "patterns": PATTERNS,
    "rslora": {"use_rslora": True},
    "rslora-patterns": {"use_rslora": True, **PATTERNS},
    "norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "a-whole-layer": {"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]},
    "lora-on-the-head": {"target_modules": ["q_proj", "lm_head"]},
    "lora-on-the-embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    return weights


@torch.no_grad()
def logits(model, length: int = 40) -> torch.Tensor:
    ids = torch.arange(2 * length).reshape(2, length) * 7 % 384
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


# ---- compared with PEFT


@pytest.mark.parametrize("name", ADAPTERS)
def test_equal_to_pefts_merge_to_the_last_bit(bases, tmp_path, name):
    base = bases()
    save_adapter(tmp_path / "adapter", base, **ADAPTERS[name])
    ours, theirs = merged(tmp_path / "ours", base, tmp_path / "adapter"), by_peft(base, tmp_path / "adapter")
    assert_same(ours, theirs)
    before = load_file(base / "model.safetensors")
    assert any(not torch.equal(ours[key], before[key]) for key in before)


DORA = {
    "dora": {},
    "rslora-patterns": {"use_rslora": True, **PATTERNS},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "a-whole-layer": {"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]},
}


@pytest.mark.parametrize("name", DORA)
def test_dora_equals_pefts_merge(bases, tmp_path, name):
    base = bases()
    model = save_adapter(tmp_path / "adapter", base, use_dora=True, **DORA[name])
    ours, theirs = merged(tmp_path / "ours", base, tmp_path / "adapter"), by_peft(base, tmp_path / "adapter")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert_close(ours[key], value, atol=1e-6, rtol=2e-6, msg=key)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert_close(logits(plain), logits(model), atol=1e-4, rtol=1e-4)
    assert (logits(plain) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().mean() > 0.05


def test_dora_by_hand(bases, tmp_path):
    """Rows of W + 4 B A (alpha / rank), scaled to the trained lengths."""
    base = bases()
    save_adapter(tmp_path / "adapter", base, use_dora=True, target_modules=["q_proj"])
    name = "model.layers.1.self_attn.q_proj"
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b, length = (
        lora[f"base_model.model.{name}.lora_{part}"] for part in ("A.weight", "B.weight", "magnitude_vector")
    )
    rows = load_file(base / "model.safetensors")[f"{name}.weight"].double() + 4 * b.double() @ a.double()
    expected = length.double()[:, None] * rows / rows.square().sum(1, keepdim=True).sqrt()
    ours = merged(tmp_path / "ours", base, tmp_path / "adapter")[f"{name}.weight"]
    assert_close(ours.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"bias": "lora_only"}], ids=["none", "all", "lora_only"])
def test_biases(bases, tmp_path, options):
    base = bases(config_class=Qwen2Config)
    save_adapter(tmp_path / "adapter", base, **options)
    assert_same(merged(tmp_path / "ours", base, tmp_path / "adapter"), by_peft(base, tmp_path / "adapter"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_base", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_the_exact_sum_rounded_once(bases, tmp_path, of_base, dtype):
    base = bases(dtype=of_base)
    save_adapter(tmp_path / "adapter", base, **ADAPTERS["norms"])
    exact = by_peft(base, tmp_path / "adapter")
    assert_same(
        merged(tmp_path / "ours", base, tmp_path / "adapter", dtype),
        {name: value.to(dtype) for name, value in exact.items()},
    )
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_an_adapter_in_half_precision(bases, tmp_path):
    save_adapter(tmp_path / "adapter", bases())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    assert_same(merged(tmp_path / "ours", bases(), tmp_path / "adapter"), by_peft(bases(), tmp_path / "adapter"))


# ---- one matrix for embedding and head, or two


TIED = {
    "lora": ({}, True),
    "norms": ({"modules_to_save": ["norm"]}, True),
    "both-trained": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "embedding-trained": ({"modules_to_save": ["embed_tokens"]}, False),
    "head-trained": ({"modules_to_save": ["lm_head"]}, False),
    "lora-on-the-head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "lora-on-the-embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
}


@pytest.mark.filterwarnings("ignore:Model (with|has)")
@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings(bases, tmp_path, name):
    """The merged model equals the adapter on its base; if that takes two matrices, its config is untied."""
    options, stays_tied = TIED[name]
    base = bases(tied=True)
    model = save_adapter(tmp_path / "adapter", base, **options)
    expected = logits(model)
    weights = merged(tmp_path / "ours", base, tmp_path / "adapter")
    assert ("lm_head.weight" in weights) != stays_tied
    plan = plan_merge(str(base), str(tmp_path / "adapter"), load_config(str(base)), dtype=torch.float32)
    assert plan.changes.keys() <= plan.tensors.keys()  # no change of a tensor that is not written
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.tie_word_embeddings == stays_tied
    assert_close(logits(loaded), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().mean() > 0.02


def test_a_tied_base_saved_under_the_heads_name(bases, tmp_path):
    weights = load_file(bases(tied=True) / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    base = copied(bases(tied=True), tmp_path / "base", weights)
    save_adapter(tmp_path / "adapter", bases(tied=True))
    assert_same(merged(tmp_path / "ours", base, tmp_path / "adapter"), by_peft(bases(tied=True), tmp_path / "adapter"))


def in_shards(base: Path, folder: Path):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3


def in_bin(base: Path, folder: Path, **options):
    copied(base, folder, {})
    (folder / "model.safetensors").unlink()
    torch.save(load_file(base / "model.safetensors"), folder / "pytorch_model.bin", **options)


def in_old_bin(base: Path, folder: Path):
    in_bin(base, folder, _use_new_zipfile_serialization=False)


def in_bin_shards(base: Path, folder: Path):
    in_bin(base, folder)
    weights = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    places = {name: f"pytorch_model-0000{1 + at % 2}-of-00002.bin" for at, name in enumerate(weights)}
    for file in set(places.values()):
        torch.save({name: value for name, value in weights.items() if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def with_old_buffers(base: Path, folder: Path):
    """As in LLaMA2's first files, which hold each layer's rotary frequencies."""
    weights = load_file(base / "model.safetensors")
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in (0, 1)}
    copied(base, folder, weights | frequencies)


@pytest.mark.parametrize("save", [in_shards, in_bin, in_old_bin, in_bin_shards, with_old_buffers])
def test_file_formats_of_the_base(bases, tmp_path, save, capsys):
    save(bases(), tmp_path / "base")
    save_adapter(tmp_path / "adapter", bases(), **ADAPTERS["norms"])
    ours = merged(tmp_path / "ours", tmp_path / "base", tmp_path / "adapter", max_shard_bytes=150_000)
    assert_same(ours, by_peft(bases(), tmp_path / "adapter"))
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(stock[name], value) for name, value in ours.items())
    assert "ignored" not in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("prefix", [None, "", "base_model.model."], ids=["adapter-alone", "bare", "prefixed"])
def test_the_originals_files(bases, tmp_path, prefix, tied):
    expected = original(tmp_path / "original", bases(tied), prefix)
    assert_same(merged(tmp_path / "ours", bases(tied), tmp_path / "original"), expected)


# ---- the weights that 4-bit training uses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nf4_weights_are_those_of_training(bases, tmp_path, dtype):
    """Bit-identical, and only for the layers that training quantizes; all other weights are the base's own."""
    save_adapter(tmp_path / "adapter", bases(), target_modules=["q_proj"])
    ours = merged(tmp_path / "ours", bases(), tmp_path / "adapter", dtype, "nf4")
    model = load_base(str(bases()), load_config(str(bases())), dtype=dtype, load_in_4bit=True, device="cpu")
    quantized = 0
    for path, layer in model.named_modules():
        if not isinstance(layer, bitsandbytes.nn.Linear4bit):
            continue
        seen = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        if path.endswith("q_proj"):
            stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
            a, b = (stored[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
            seen = (seen.float() + (b @ a) * 4.0).to(dtype)
        assert torch.equal(ours[f"{path}.weight"], seen), path
        quantized += 1
    assert quantized == 2 * 7
    own = load_file(bases() / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(ours[name], own[name].to(dtype))


def test_nf4_is_lossy():
    weight = torch.randn(64, 128)
    assert 0.02 < float((nf4_round_trip(weight) - weight).abs().mean()) < 0.2


# ---- memory, and damaged weights


def test_memory_is_that_of_a_tensor_not_of_the_model(tmp_path):
    """120 MB of weights and a 25 MB adapter; two tensors with their sums take at most 36 MB."""
    config = LlamaConfig(vocab_size=256, hidden_size=1024, intermediate_size=2816, num_hidden_layers=5)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(base)
    save_wide_adapter(tmp_path / "adapter", base)
    (tmp_path / "ours").mkdir()
    plan = plan_merge(str(base), str(tmp_path / "adapter"), load_config(str(base)), dtype=torch.float16)
    assert plan.size > 120e6
    merged_tensor(plan, "model.layers.0.mlp.up_proj.weight", Scratch())  # libraries allocate buffers at first use
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = process_bytes("VmRSS")
    write_merged(tmp_path / "ours", plan, max_shard_bytes=50_000_000)
    assert process_bytes("VmHWM") - before < 50e6


def save_wide_adapter(folder: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    model = get_peft_model(model, LoraConfig(r=64, target_modules=LINEAR, task_type="CAUSAL_LM"))
    model.save_pretrained(folder)


def process_bytes(field: str) -> int:
    """Resident memory of this process: current (VmRSS) or peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (300.0, torch.float16)])
def test_nan_and_infinite_weights_are_refused(bases, tmp_path, value, dtype):
    save_adapter(tmp_path / "adapter", bases())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    for part in "AB":
        weights[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{part}.weight"].fill_(value)
    save_file(weights, file)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj"):
        merged(tmp_path / "ours", bases(), tmp_path / "adapter", dtype)


def test_a_full_disk(bases, tmp_path, monkeypatch):
    save_adapter(tmp_path / "adapter", bases())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="--save_path"):
        merged(tmp_path / "ours", bases(), tmp_path / "adapter")
