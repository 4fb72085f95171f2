"""Merging tensor by tensor: PEFT's own merge to the last bit, whatever the adapter, the base and its files are."""

import copy
import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config

from component.error import UserError
from component.merge.plan import plan_merge
from component.merge.write import Scratch, merged_tensor, nf4_round_trip, write_merged
from component.model import load_base, load_config
from component.rope import extend_context
from component.storage.tensor_reader import model_tensors
from component.tokenizer import save_tokenizer

CPU = torch.device("cpu")
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
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


@pytest.fixture(scope="module")
def bases(tmp_path_factory, llama_config):
    """bases(tied, config class, dtype) -> a folder with a grouped-query base, its rows one block of NF4 wide."""
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
                for parameter in model.parameters():  # norms of one, and biases of zero, would hide what is missing
                    parameter.data += 0.1 * torch.randn_like(parameter)
            made[tied, config_class, dtype] = tmp_path_factory.mktemp("base")
            model.to(dtype).save_pretrained(made[tied, config_class, dtype])
        return made[tied, config_class, dtype]

    return make


def save_adapter(folder: Path, base: Path, **options) -> PeftModel:
    """By PEFT itself, moved at random; the model in memory."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 16, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(model, LoraConfig(**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def merged(folder: Path, base: Path, adapter: Path, dtype=torch.float32, base_weights="fp16", **options):
    """What we write, read again."""
    folder.mkdir(exist_ok=True)
    plan = plan_merge(str(base), str(adapter), load_config(str(base)), dtype=dtype, base_weights=base_weights)
    write_merged(folder, plan, **options)
    return {name: stored.read() for name, stored in model_tensors(str(folder)).items()}


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    return weights


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@torch.no_grad()
def logits(model, length: int = 40) -> torch.Tensor:
    ids = torch.arange(2 * length).reshape(2, length) * 7 % 384
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


# ---- the same as PEFT


@pytest.mark.parametrize("name", ADAPTERS)
def test_equal_to_pefts_merge_to_the_last_bit(bases, tmp_path, name):
    base = bases()
    save_adapter(tmp_path / "adapter", base, **ADAPTERS[name])
    ours, theirs = merged(tmp_path / "ours", base, tmp_path / "adapter"), by_peft(base, tmp_path / "adapter")
    assert_same(ours, theirs)
    before = load_file(base / "model.safetensors")
    assert any(not torch.equal(ours[key], before[key]) for key in before)


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
    """The merged model computes what the adapter does; where that takes two matrices, it has two, and says so."""
    options, stays_tied = TIED[name]
    base = bases(tied=True)
    model = save_adapter(tmp_path / "adapter", base, **options)
    expected = logits(model)
    weights = merged(tmp_path / "ours", base, tmp_path / "adapter")
    assert ("lm_head.weight" in weights) != stays_tied
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


# ---- the files of a base


def copied(base: Path, folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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
    """As LLaMA2's first files: each layer's rotary frequencies among the weights."""
    weights = load_file(base / "model.safetensors")
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in (0, 1)}
    copied(base, folder, weights | frequencies)


@pytest.mark.parametrize("spread", [in_shards, in_bin, in_old_bin, in_bin_shards, with_old_buffers])
def test_the_files_of_a_base(bases, tmp_path, spread, capsys):
    spread(bases(), tmp_path / "base")
    save_adapter(tmp_path / "adapter", bases(), **ADAPTERS["norms"])
    ours = merged(tmp_path / "ours", tmp_path / "base", tmp_path / "adapter", max_shard_bytes=150_000)
    assert_same(ours, by_peft(bases(), tmp_path / "adapter"))
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(stock[name], value) for name, value in ours.items())
    assert "left out" not in capsys.readouterr().err


def test_a_tensor_of_no_layer_is_named(bases, tmp_path, capsys):
    base = copied(bases(), tmp_path / "base", load_file(bases() / "model.safetensors") | {"extra": torch.ones(2)})
    save_adapter(tmp_path / "adapter", bases())
    assert "extra" not in merged(tmp_path / "ours", base, tmp_path / "adapter")
    assert "1 tensors belong to no layer and are left out, as extra" in capsys.readouterr().err


def without_a_weight(weights):
    weights.pop("model.layers.1.mlp.up_proj.weight")
    return "lacks 1 weights", "layers.1.mlp.up_proj"


def with_another_shape(weights):
    weights["model.norm.weight"] = torch.ones(65)
    return "model.norm.weight", "(65,)", "(64,)"


@pytest.mark.parametrize("spoil", [without_a_weight, with_another_shape])
def test_bases_that_do_not_fit(bases, tmp_path, spoil):
    weights = load_file(bases() / "model.safetensors")
    parts = spoil(weights)
    base = copied(bases(), tmp_path / "base", weights)
    save_adapter(tmp_path / "adapter", bases())
    with pytest.raises(UserError, match="model_name_or_path") as error:
        merged(tmp_path / "ours", base, tmp_path / "adapter")
    assert all(part in str(error.value) for part in parts)


def test_a_quantised_base(bases, tmp_path):
    base = copied(bases(), tmp_path / "base", load_file(bases() / "model.safetensors"))
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (base / "config.json").write_text(json.dumps(config))
    save_adapter(tmp_path / "adapter", bases())
    with pytest.raises(UserError, match="16-bit model"):
        merged(tmp_path / "ours", base, tmp_path / "adapter")


# ---- adapters that are no plain LoRA


@pytest.mark.parametrize(
    ("options", "part"),
    [({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias"),
     ({"trainable_token_indices": [1, 2]}, "trainable_token_indices")],
)  # fmt: skip
def test_what_is_more_than_lora_is_refused(bases, tmp_path, options, part):
    base = bases(config_class=Qwen2Config)
    save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], **options)
    with pytest.raises(UserError, match=part):
        merged(tmp_path / "ours", base, tmp_path / "adapter")


def change_config(adapter: Path, **values) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_start_that_changed_the_base_is_refused(bases, tmp_path):
    save_adapter(tmp_path / "adapter", bases())
    change_config(tmp_path / "adapter", init_lora_weights="pissa_niter_4")
    with pytest.raises(UserError, match="pissa"):
        merged(tmp_path / "ours", bases(), tmp_path / "adapter")


@pytest.mark.parametrize(
    "extra", ["base_model.model.model.layers.2.mlp.up_proj.lora_B.weight", "something",
              "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"],
)  # fmt: skip
def test_every_key_is_accounted_for(bases, tmp_path, extra):
    save_adapter(tmp_path / "adapter", bases())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), extra: torch.zeros(64, 4)}, file)
    with pytest.raises(UserError) as error:
        merged(tmp_path / "ours", bases(), tmp_path / "adapter")
    assert extra.removeprefix("base_model.model.").removesuffix(".weight") in str(error.value)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_half_of_a_change_is_refused(bases, tmp_path, part):
    save_adapter(tmp_path / "adapter", bases())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(f"base_model.model.model.layers.0.self_attn.o_proj.{part}.weight")
    save_file(weights, file)
    with pytest.raises(UserError, match=f"o_proj.{part}"):
        merged(tmp_path / "ours", bases(), tmp_path / "adapter")


# ---- the original projects' files


def original(folder: Path, base: Path, prefix: str | None) -> dict[str, torch.Tensor]:
    """As PEFT 0.4 and LongLoRA wrote them; the merged weights by hand."""
    folder.mkdir()
    config = {
        "auto_mapping": None, "base_model_name_or_path": "/public/model/Llama-2-7b-hf", "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "lora_alpha": 16, "lora_dropout": 0.05, "modules_to_save": None,
        "peft_type": "LORA", "r": 8, "revision": None, "target_modules": LINEAR, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    weights = load_file(base / "model.safetensors")
    lora, extras = {}, {}
    for name in weights:
        path, of_layer = name.removesuffix(".weight"), name.split(".")[-2]
        if of_layer in LINEAR:
            rows, columns = weights[name].shape
            a, b = 0.3 * torch.randn(8, columns), 0.3 * torch.randn(rows, 8)
            lora |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
            weights[name] += (b @ a) * 2.0
        elif prefix is not None and ("norm" in name or "embed" in name):
            weights[name] = (weights[name] + 0.3 * torch.randn_like(weights[name])).bfloat16().float()
            extras[prefix + name] = weights[name].bfloat16()
    torch.save(lora, folder / "adapter_model.bin")
    if prefix is not None:
        assert len(extras) == 6
        torch.save(extras, folder / "trainable_params.bin")
    return weights


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("prefix", [None, "", "base_model.model."], ids=["adapter-alone", "bare", "prefixed"])
def test_the_originals_files(bases, tmp_path, prefix, tied):
    expected = original(tmp_path / "original", bases(tied), prefix)
    assert_same(merged(tmp_path / "ours", bases(tied), tmp_path / "original"), expected)


def test_the_row_of_an_added_pad_token_is_explained(bases, tmp_path):
    """LongLoRA's 32001 rows on LLaMA2's 32000."""
    original(tmp_path / "original", bases(), "")
    torch.save({"model.embed_tokens.weight": torch.zeros(385, 64)}, tmp_path / "original" / "trainable_params.bin")
    with pytest.raises(UserError, match=r"\(385, 64\).*\(384, 64\).*pad token"):
        merged(tmp_path / "ours", bases(), tmp_path / "original")


def test_an_extra_weight_of_nothing_is_refused(bases, tmp_path):
    original(tmp_path / "original", bases(), "")
    torch.save({"model.norms.weight": torch.zeros(64)}, tmp_path / "original" / "trainable_params.bin")
    with pytest.raises(UserError, match=r"trainable_params\.bin: model\.norms\.weight"):
        merged(tmp_path / "ours", bases(), tmp_path / "original")


# ---- the weights that 4-bit training sees


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nf4_weights_are_those_of_training(bases, tmp_path, dtype):
    """To the last bit, of exactly the layers that training quantises; everything else is the base's own."""
    save_adapter(tmp_path / "adapter", bases(), target_modules=["q_proj"])
    ours = merged(tmp_path / "ours", bases(), tmp_path / "adapter", dtype, "nf4")
    model = load_base(str(bases()), load_config(str(bases())), dtype=dtype, load_in_4bit=True, device="cpu")
    quantised = 0
    for path, layer in model.named_modules():
        if not isinstance(layer, bitsandbytes.nn.Linear4bit):
            continue
        seen = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        if path.endswith("q_proj"):
            stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
            a, b = (stored[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
            seen = (seen.float() + (b @ a) * 4.0).to(dtype)
        assert torch.equal(ours[f"{path}.weight"], seen), path
        quantised += 1
    assert quantised == 2 * 7
    own = load_file(bases() / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(ours[name], own[name].to(dtype))


def test_nf4_loses_something():
    weight = torch.randn(64, 128)
    again = nf4_round_trip(weight)
    assert 0.02 < float((again - weight).abs().mean()) < 0.2


# ---- memory, and what becomes of broken weights


def test_memory_is_that_of_a_tensor_not_of_the_model(tmp_path):
    """120 MB of weights and 25 MB of an adapter; two tensors with their sums take 36 MB at most."""
    config = LlamaConfig(vocab_size=256, hidden_size=1024, intermediate_size=2816, num_hidden_layers=5)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(base)
    save_wide_adapter(tmp_path / "adapter", base)
    (tmp_path / "ours").mkdir()
    plan = plan_merge(str(base), str(tmp_path / "adapter"), load_config(str(base)), dtype=torch.float16)
    assert plan.size > 120e6
    merged_tensor(plan, "model.layers.0.mlp.up_proj.weight", Scratch())  # libraries' buffers of the first call
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = held("VmRSS")
    write_merged(tmp_path / "ours", plan, max_shard_bytes=50_000_000)
    assert held("VmHWM") - before < 50e6


def save_wide_adapter(folder: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    model = get_peft_model(model, LoraConfig(r=64, target_modules=LINEAR, task_type="CAUSAL_LM"))
    model.save_pretrained(folder)


def held(which: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (300.0, torch.float16)])
def test_weights_that_are_no_numbers_are_refused(bases, tmp_path, value, dtype):
    save_adapter(tmp_path / "adapter", bases())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    for part in "AB":
        weights[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{part}.weight"].fill_(value)
    save_file(weights, file)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj"):
        merged(tmp_path / "ours", bases(), tmp_path / "adapter", dtype)


def test_a_disk_without_room(bases, tmp_path, monkeypatch):
    save_adapter(tmp_path / "adapter", bases())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="--save_path"):
        merged(tmp_path / "ours", bases(), tmp_path / "adapter")


# ---- what stands beside the weights


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_the_config_is_the_extended_one(bases, tmp_path, rope_type):
    save_adapter(tmp_path / "adapter", bases())
    config = load_config(str(bases()))
    extend_context(config, 256, rope_type)
    before = copy.deepcopy(config.to_dict())
    plan = plan_merge(str(bases()), str(tmp_path / "adapter"), config, dtype=torch.float16)
    assert config.to_dict() == before
    (tmp_path / "ours").mkdir()
    write_merged(tmp_path / "ours", plan)
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["rope_parameters"]["factor"] == 4.0
    assert saved["max_position_embeddings"] == 64
    assert (saved["use_cache"], saved["dtype"], saved["architectures"]) == (True, "float16", ["LlamaForCausalLM"])


def test_llama2s_generation_config_can_be_saved(bases, tmp_path):
    """It has sampling values with sampling switched off, which transformers refuses to save."""
    base = copied(bases(), tmp_path / "base", load_file(bases() / "model.safetensors"))
    save_adapter(tmp_path / "adapter", bases())
    generation = {"bos_token_id": 0, "eos_token_id": 1, "temperature": 0.9, "top_p": 0.6, "max_length": 4096}
    (base / "generation_config.json").write_text(json.dumps(generation))
    merged(tmp_path / "greedy", base, tmp_path / "adapter")
    assert json.loads((tmp_path / "greedy" / "generation_config.json").read_text())["eos_token_id"] == 1
    (base / "generation_config.json").write_text(json.dumps(generation | {"do_sample": True}))
    merged(tmp_path / "sampled", base, tmp_path / "adapter")
    sampling = GenerationConfig.from_pretrained(tmp_path / "sampled")
    assert (sampling.temperature, sampling.top_p) == (0.9, 0.6)


def test_sentencepieces_own_file_comes_along(tokenizer, tmp_path):
    for name in ("own", "base", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"pieces")
    save_tokenizer(tmp_path / "merged", tokenizer, (str(tmp_path / "own"), str(tmp_path / "base")))
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"pieces"
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in (tmp_path / "merged").iterdir()}
