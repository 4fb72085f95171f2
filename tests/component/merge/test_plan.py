"""What does an adapter do to each tensor of its base? What does not fit, or is not plain LoRA, is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Qwen2Config

from component.error import UserError
from component.merge.plan import plan_merge
from component.merge.write import write_merged
from component.model import load_config
from component.rope import extend_context
from tests.merging import copied, merged, original, save_adapter


def test_a_tensor_of_no_layer_is_named(bases, tmp_path, capsys):
    base = copied(bases(), tmp_path / "base", load_file(bases() / "model.safetensors") | {"extra": torch.ones(2)})
    save_adapter(tmp_path / "adapter", bases())
    assert "extra" not in merged(tmp_path / "ours", base, tmp_path / "adapter")
    assert "1 tensors belong to no layer and are ignored: extra" in capsys.readouterr().err


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


@pytest.mark.parametrize("head", ["equal", "different"])
def test_a_tied_base_that_holds_a_head(bases, tmp_path, head):
    """transformers ties only equal ones, whatever the config says; the merged model has a single matrix."""
    weights = load_file(bases(tied=True) / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + float(head == "different")
    base = copied(bases(tied=True), tmp_path / "base", weights)
    save_adapter(tmp_path / "adapter", bases(tied=True))
    if head == "different":
        with pytest.raises(UserError, match=r"tie_word_embeddings: true, but lm_head.weight differs from model.embed"):
            merged(tmp_path / "ours", base, tmp_path / "adapter")
    else:
        assert "lm_head.weight" not in merged(tmp_path / "ours", base, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("stored", "problem"),
    [({"quant_method": "bitsandbytes", "load_in_4bit": True}, "are quantized to 4 bits, and a merge writes 16 or 32"),
     ({"quant_method": "gptq"}, "are quantized by 'gptq', which is not supported")],
)  # fmt: skip
def test_k12_a_quantized_base(bases, tmp_path, stored, problem):
    base = copied(bases(), tmp_path / "base", load_file(bases() / "model.safetensors"))
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": stored}
    (base / "config.json").write_text(json.dumps(config))
    save_adapter(tmp_path / "adapter", bases())
    with pytest.raises(UserError, match=f"{problem}.*; name the 16-bit model"):
        merged(tmp_path / "ours", base, tmp_path / "adapter")


def test_k16_what_a_merged_model_gets_from_its_base(bases, tmp_path):
    """Sampling values and special tokens; nothing that names code."""
    base = copied(bases(), tmp_path / "base", load_file(bases() / "model.safetensors"))
    evil = {"auto_map": {"AutoConfig": "evil.Config"}, "custom_generate": "someone/code"}
    for name, more in (("config.json", {"attn_implementation": "someone/kernel"}), ("generation_config.json", {})):
        text = json.loads((bases() / name).read_text()) | evil | more
        (base / name).write_text(json.dumps(text | ({"do_sample": True, "top_p": 0.5} if not more else {})))
    save_adapter(tmp_path / "adapter", bases())
    merged(tmp_path / "ours", base, tmp_path / "adapter")
    generation = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert (generation["do_sample"], generation["top_p"]) == (True, 0.5)
    saved = "".join((tmp_path / "ours" / name).read_text() for name in ("config.json", "generation_config.json"))
    assert "evil" not in saved
    assert "someone" not in saved


@pytest.mark.parametrize("part", ["base", "adapter"])
def test_k15_which_file_is_not_finite(bases, tmp_path, part):
    base = copied(bases(), tmp_path / "base", load_file(bases() / "model.safetensors"))
    save_adapter(tmp_path / "adapter", bases())
    file = base / "model.safetensors" if part == "base" else tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "layers.1.self_attn.q_proj" in name)
    weights[name][1, 2] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{file}: {name} holds infinite or NaN values; download or train it again"):
        merged(tmp_path / "ours", base, tmp_path / "adapter")


# ---- adapters that are not plain LoRA


@pytest.mark.parametrize(
    ("options", "part"),
    [({"lora_bias": True}, "lora_bias"),
     ({"trainable_token_indices": [1, 2]}, "trainable_token_indices")],
)  # fmt: skip
def test_other_adapter_types_are_refused(bases, tmp_path, options, part):
    base = bases(config_class=Qwen2Config)
    save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], **options)
    with pytest.raises(UserError, match=part):
        merged(tmp_path / "ours", base, tmp_path / "adapter")


def change_config(adapter: Path, **values) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_an_initialization_that_changed_the_base_is_refused(bases, tmp_path):
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
def test_a_missing_half_of_lora_is_refused(bases, tmp_path, part):
    save_adapter(tmp_path / "adapter", bases())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(f"base_model.model.model.layers.0.self_attn.o_proj.{part}.weight")
    save_file(weights, file)
    with pytest.raises(UserError, match=f"o_proj.{part}"):
        merged(tmp_path / "ours", bases(), tmp_path / "adapter")


def test_the_row_of_an_added_pad_token_is_explained(bases, tmp_path):
    """LongLoRA's 32001 rows on LLaMA2's 32000."""
    original(tmp_path / "original", bases(), "")
    torch.save({"model.embed_tokens.weight": torch.zeros(385, 64)}, tmp_path / "original" / "trainable_params.bin")
    with pytest.raises(UserError, match=r"\(385, 64\).*\(384, 64\).*pad token"):
        merged(tmp_path / "ours", bases(), tmp_path / "original")


def test_an_unknown_extra_weight_is_refused(bases, tmp_path):
    original(tmp_path / "original", bases(), "")
    torch.save({"model.norms.weight": torch.zeros(64)}, tmp_path / "original" / "trainable_params.bin")
    with pytest.raises(UserError, match=r"trainable_params\.bin: model\.norms\.weight"):
        merged(tmp_path / "ours", bases(), tmp_path / "original")


# ---- configs


@pytest.mark.parametrize(("rope_type", "longest"), [("linear", 64), ("dynamic", 256), ("yarn", 256)])
def test_the_config_is_the_extended_one(bases, tmp_path, rope_type, longest):
    save_adapter(tmp_path / "adapter", bases())
    config = load_config(str(bases()))
    extend_context(config, 256, rope_type)
    before = copy.deepcopy(config.to_dict())
    plan = plan_merge(str(bases()), str(tmp_path / "adapter"), config, dtype=torch.float16)
    assert config.to_dict() == before
    (tmp_path / "ours").mkdir()
    write_merged(tmp_path / "ours", plan)
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["rope_parameters"].get("factor") == (None if rope_type == "dynamic" else 4.0)
    assert saved["max_position_embeddings"] == longest  # tests/component/merge/test_serving.py has all of it
    assert (saved["use_cache"], saved["dtype"], saved["architectures"]) == (True, "float16", ["LlamaForCausalLM"])


def test_llama2s_generation_config_can_be_saved(bases, tmp_path):
    """It has sampling values with do_sample off, which transformers refuses to save."""
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
