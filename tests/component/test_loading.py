"""How is a model loaded for inference? Plain, merged, or base and adapter, each at its extended context."""

import json
import os
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from component.adapter import adapter_hash, add_adapter
from component.checkpoint import write_adapter, write_record
from component.error import UserError
from component.loading import (
    extended_config_of,
    inference_dtype,
    load_for_inference,
    load_model,
    recorded_template,
    resolve_model,
)
from component.model import load_base, load_config
from component.rope import context_length, extend_context
from component.storage.fingerprint import fingerprint

CPU = torch.device("cpu")


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def ids(llama_config):
    return torch.randint(llama_config.vocab_size, (1, 100))


@pytest.fixture
def adapter_folder(base_folder, tokenizer, tmp_path):
    """adapter_folder(target) -> (LongQLoRA adapter folder for a base scaled to `target` tokens, its model)."""

    def make(target: int = 128, base: Path = base_folder, rope_type: str = "linear"):
        config = load_config(str(base))
        factor = extend_context(config, target, rope_type)
        model = load_base(str(base), config, dtype=torch.float32, load_in_4bit=False, device=CPU)
        model = add_adapter(model, rank=4, alpha=16, dropout=0.0, train_norm=True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        folder = tmp_path / f"adapter-{target}-{rope_type}"
        write_adapter(folder, model, tokenizer, config)
        write_record(folder, {"base_model": str(base), "rope_type": rope_type, "rope_factor": factor, "steps": 1})
        return folder, model.eval()

    return make


# ---- its context


@pytest.mark.parametrize("size", [None, 0, -1, 1, 64])
def test_a_base_is_not_changed_without_a_larger_context(base_folder, size):
    stock = AutoConfig.from_pretrained(base_folder)
    assert extended_config_of(str(base_folder), size).to_dict() == stock.to_dict()


@pytest.mark.parametrize(("size", "factor"), [(65, 2.0), (128, 2.0), (129, 3.0), (640, 10.0)])
def test_a_base_is_scaled_as_in_training(base_folder, size, factor):
    config = extended_config_of(str(base_folder), size)
    assert config.rope_parameters == {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    assert config.max_position_embeddings == 64


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_an_extended_model_has_its_own_factor(base_folder, tmp_path, rope_type):
    config = load_config(str(base_folder))
    extend_context(config, 256, rope_type)
    config.save_pretrained(tmp_path)
    for size in (None, -1, 256, 250, 193):
        found = extended_config_of(str(tmp_path), size)
        assert found.rope_parameters["rope_type"] == rope_type
        assert found.rope_parameters["factor"] == 4.0
    with pytest.raises(UserError, match=r"context_size: 257.*factor 5.*256 tokens.*factor 4"):
        extended_config_of(str(tmp_path), 257)
    with pytest.raises(UserError, match=r"context_size: 100.*factor 2.*256 tokens.*factor 4"):
        extended_config_of(str(tmp_path), 100)


def test_k5_a_base_trained_with_a_scaling(own_base):
    """llama3's own factor is raised; other scalings cannot be extended."""
    config = load_config(str(own_base))
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    config.rope_parameters = {**llama3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config.max_position_embeddings = 128
    config.save_pretrained(own_base)
    for size, factor in ((100, 4.0), (128, 4.0), (129, 8.0), (300, 12.0)):
        found = extended_config_of(str(own_base), size)
        assert found.rope_parameters == {**config.rope_parameters, "factor": factor}
    with pytest.raises(UserError, match=r"context_size: 129 tokens, but the context of .* is 128 tokens"):
        extended_config_of(str(own_base), 129, is_fixed=True)
    config.rope_parameters = {"rope_type": "proportional", "rope_theta": 1e4}
    config.save_pretrained(own_base)
    assert extended_config_of(str(own_base), 128).rope_parameters["rope_type"] == "proportional"
    with pytest.raises(UserError, match=r"context_size: 129 tokens.*use at most 128"):
        extended_config_of(str(own_base), 129)


def test_k5_a_loaded_model_forgets_earlier_lengths(base_folder):
    """Windows or prompts measured one after another, with dynamic scaling."""
    config = load_config(str(base_folder))
    extend_context(config, 256, "dynamic")
    model = load_base(str(base_folder), config, dtype=torch.float32, load_in_4bit=False, device=CPU)
    short, long = torch.randint(300, (1, 100)), torch.randint(300, (1, 250))
    first = logits(model, short)
    logits(model, long)
    assert torch.equal(logits(model, short), first)


@pytest.mark.parametrize("target", [64, 128])
def test_our_adapter_keeps_its_factor(adapter_folder, base_folder, target):
    """Even one that was trained without scaling."""
    folder, _ = adapter_folder(target)
    for size in (None, target, target - 10):
        model, _ = load_for_inference(None, str(folder), context_size=size, device=CPU)
        assert model.config.rope_parameters.get("factor", 1.0) == target / 64
    for base in (None, str(base_folder)):
        with pytest.raises(UserError, match=f"context_size: {target + 1}"):
            load_for_inference(base, str(folder), context_size=target + 1, device=CPU)


@pytest.fixture
def raised_adapter(base_folder, tokenizer, tmp_path):
    """raised_adapter(record) -> an adapter on the base of 64 tokens whose base frequency was raised for 150."""

    def make(**record) -> str:
        config = load_config(str(base_folder))
        extend_context(config, 150, "theta", rope_theta=50000.0)
        model = load_base(str(base_folder), config, dtype=torch.float32, load_in_4bit=False, device=CPU)
        write_adapter(tmp_path / "raised", add_adapter(model, rank=4, alpha=16, dropout=0.0), tokenizer, config)
        usual = {"base_model": str(base_folder), "rope_type": "theta", "rope_factor": 3.0, "rope_theta": 50000.0}
        write_record(tmp_path / "raised", usual | {"context_tokens": 150} | record)
        return str(tmp_path / "raised")

    return make


def test_a_raised_theta_has_the_recorded_context(raised_adapter):
    """config.json says the base's length, for stock transformers; only the record knows the new one."""
    folder = raised_adapter()
    assert json.loads((Path(folder) / "config.json").read_text())["max_position_embeddings"] == 64
    for size in (None, -1, 100, 150):
        model, _ = load_for_inference(None, folder, context_size=size, device=CPU)
        assert context_length(model.config) == 150
        assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 50000.0}
    with pytest.raises(UserError, match=r"context_size: 151 tokens.*but the context of .* is 150 tokens"):
        load_for_inference(None, folder, context_size=151, device=CPU)


@pytest.mark.parametrize("tokens", [None, "150", True, 63, 2**31])
def test_a_raised_theta_without_a_context(raised_adapter, tokens):
    with pytest.raises(UserError, match=rf"longqlora\.json is damaged \(context_tokens: {tokens}\)"):
        load_for_inference(None, raised_adapter(context_tokens=tokens), device=CPU)


def test_a_record_that_contradicts_the_config(raised_adapter):
    with pytest.raises(UserError, match=r"longqlora\.json says rope_theta 60000\.0, but config\.json 50000; copy"):
        load_for_inference(None, raised_adapter(rope_theta=60000.0), device=CPU)


# ---- base and adapter


def test_an_adapter_records_its_base_and_context(adapter_folder, ids):
    folder, trained = adapter_folder(128)
    model, tokenizer = load_for_inference(None, str(folder), device=CPU)
    assert not model.training
    assert_close(logits(model, ids), logits(trained, ids), atol=1e-5, rtol=1e-5)
    assert tokenizer.eos_token == "</s>"


def test_a_moved_base_can_be_named(adapter_folder, own_base, ids):
    """The context is still the adapter's."""
    folder, trained = adapter_folder(128)
    record = json.loads((folder / "longqlora.json").read_text())
    (folder / "longqlora.json").write_text(json.dumps({**record, "base_model": "/gone"}))
    with pytest.raises(UserError, match="/gone"):
        load_for_inference(None, str(folder), device=CPU)
    model, _ = load_for_inference(str(own_base), str(folder), device=CPU)
    assert_close(logits(model, ids), logits(trained, ids), atol=1e-5, rtol=1e-5)


def make_foreign(folder: Path, **changes) -> str:
    """Leave only PEFT's own files in an adapter folder."""
    for name in ("longqlora.json", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(folder)


def test_another_projects_adapter_needs_its_base_and_context(adapter_folder, base_folder, ids):
    folder, trained = adapter_folder(128)
    make_foreign(folder, base_model_name_or_path=None)
    with pytest.raises(UserError, match=r"model_name_or_path: missing.*which base model"):
        load_for_inference(None, str(folder), device=CPU)
    model, _ = load_for_inference(str(base_folder), str(folder), context_size=128, device=CPU)
    assert_close(logits(model, ids), logits(trained, ids), atol=1e-5, rtol=1e-5)
    unscaled, _ = load_for_inference(str(base_folder), str(folder), device=CPU)
    assert (logits(unscaled, ids) - logits(trained, ids)).abs().mean() > 1e-2


def test_a_truncated_adapter_is_refused(adapter_folder):
    folder, _ = adapter_folder(128)
    os.truncate(folder / "adapter_model.safetensors", 3000)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is 3000 bytes"):
        load_for_inference(None, str(folder), device=CPU)


def test_a_plain_model(base_folder, ids):
    model, _ = load_for_inference(str(base_folder), device=CPU)
    stock = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    assert_close(logits(model, ids), logits(stock, ids), atol=0, rtol=0)
    assert model.config._attn_implementation == "sdpa"
    in_4bit, _ = load_for_inference(str(base_folder), load_in_4bit=True, device=CPU)
    assert any(isinstance(layer, bitsandbytes.nn.Linear4bit) for layer in in_4bit.modules())
    assert logits(in_4bit, ids).isfinite().all()


@pytest.mark.parametrize(
    ("recorded", "expected"), [({"template": None}, "tokenizer"), ({"template": "vicuna"}, "vicuna"), ({}, "vicuna")]
)
def test_the_template_of_a_model(recorded, expected, base_folder, tmp_path):
    """K2c: a plain chat model with a template of its own was asked in Vicuna's format."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    assert recorded_template(tokenizer) == "vicuna"
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert recorded_template(tokenizer) == "tokenizer"
    tokenizer.save_pretrained(tmp_path)
    record = {"base_model": "b", "rope_type": "linear", "rope_factor": 2.0, "files": {}} | recorded
    (tmp_path / "longqlora.json").write_text(json.dumps(record))
    assert recorded_template(AutoTokenizer.from_pretrained(tmp_path)) == expected


# ---- which base, which adapter


def test_k21_the_base_that_an_adapter_config_names(adapter_folder, base_folder, ids, capsys):
    folder, trained = adapter_folder(128)
    make_foreign(folder, base_model_name_or_path=str(base_folder))
    model, _ = load_for_inference(None, str(folder), context_size=128, device=CPU)
    assert_close(logits(model, ids), logits(trained, ids), atol=1e-5, rtol=1e-5)
    said = capsys.readouterr().err
    assert said.count(f"model_name_or_path: {base_folder}, as {folder}'s adapter_config.json says\n") == 1


def test_k21_the_named_base_is_not_there(adapter_folder, tmp_path):
    folder, _ = adapter_folder(128)
    make_foreign(folder, base_model_name_or_path="/nowhere/base")
    with pytest.raises(UserError, match=f"model_name_or_path: there is no base model of {folder} '/nowhere/base'"):
        resolve_model(None, str(folder))


def test_k21_an_adapter_as_model(adapter_folder, base_folder, ids, capsys):
    folder, trained = adapter_folder(128)
    model, _ = load_for_inference(str(folder), device=CPU)
    assert_close(logits(model, ids), logits(trained, ids), atol=1e-5, rtol=1e-5)
    assert f"model_name_or_path: {folder} is an adapter; it is used with the base" in capsys.readouterr().err
    assert resolve_model(str(folder), None) == (str(base_folder), str(folder), True, str(folder))


def test_k21_an_adapter_as_base_of_training(adapter_folder):
    folder, _ = adapter_folder(128)
    with pytest.raises(UserError, match=r"is an adapter, not a model; merge it with script/merge_lora\.py, or name"):
        load_base(str(folder), load_config(str(folder)), dtype=torch.float32, load_in_4bit=False, device=CPU)
    make_foreign(folder)
    with pytest.raises(UserError, match="it is an adapter, not a model"):
        load_config(str(folder))


def test_k21_a_model_with_an_adapter_in_its_folder(adapter_folder, own_base):
    """Loaded by name, transformers would add it in silence."""
    folder, _ = adapter_folder(128)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (own_base / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="holds both a model and an adapter"):
        resolve_model(str(own_base), None)
    assert resolve_model(str(own_base), str(own_base)).adapter == str(own_base)


@pytest.mark.parametrize("record", ["hash", "moved", "path"])
def test_k22_the_adapter_of_a_merged_base_is_not_added_again(adapter_folder, own_base, base_folder, record):
    folder, _ = adapter_folder(128)
    origin = {"merged_from": str(folder), "base_model": str(base_folder)}
    if record != "path":  # records of earlier versions have none
        origin["merged_sha256"] = adapter_hash(str(folder))
    (own_base / "longqlora.json").write_text(json.dumps(origin))
    if record == "moved":
        folder = folder.rename(folder.parent / "elsewhere")
    with pytest.raises(UserError) as error:
        load_for_inference(str(own_base), str(folder), device=CPU)
    assert str(error.value) == (
        f"model_name_or_path: {own_base} was merged from {folder}, so the adapter would be added twice; leave the "
        f"adapter out, or name its base, {base_folder}"
    )
    assert resolve_model(str(base_folder), str(folder)).base == str(base_folder)


@pytest.mark.parametrize(("name", "warns"), [("other", True), ("base", False)])
def test_k22_a_warning_about_another_base(adapter_folder, own_base, name, warns, capsys, tmp_path):
    """Where a base was only moved, its folder keeps its name."""
    folder, _ = adapter_folder(128)
    make_foreign(folder, base_model_name_or_path="/public/model/base")
    moved = own_base.rename(tmp_path / name)
    resolve_model(str(moved), str(folder))
    warning = f"warning: {folder} was trained on /public/model/base, not on {moved}"
    assert (warning in capsys.readouterr().err) == warns


def test_a_warning_about_other_weights_of_the_same_name(adapter_folder, own_base, base_folder, capsys):
    folder, _ = adapter_folder(128)
    record = json.loads((folder / "longqlora.json").read_text())
    record |= {"base_model": str(own_base), "base_weights": fingerprint(own_base, weights_alone=True)}
    (folder / "longqlora.json").write_text(json.dumps(record))
    warning = f"warning: {own_base} has other weights than when {folder} was trained on it"
    (own_base / "config.json").write_text((own_base / "config.json").read_text() + "\n")
    resolve_model(None, str(folder))
    assert warning not in capsys.readouterr().err
    file = own_base / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    resolve_model(str(base_folder), str(folder))  # of another name: the user chose it
    assert warning not in capsys.readouterr().err
    resolve_model(None, str(folder))
    assert warning in capsys.readouterr().err


def test_k12_an_adapter_of_a_4bit_base_on_the_16bit_base(adapter_folder, base_folder, ids):
    """Earlier versions wrote the base's quantization_config into the adapter's config.json."""
    folder, trained = adapter_folder(128)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    record = json.loads((folder / "longqlora.json").read_text())
    record["files"]["config.json"] = (folder / "config.json").stat().st_size
    (folder / "longqlora.json").write_text(json.dumps(record))
    model, _ = load_for_inference(str(base_folder), str(folder), device=CPU)
    assert_close(logits(model, ids), logits(trained, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_k15_adapter_weights_that_are_not_finite(adapter_folder, base_folder, value):
    folder, _ = adapter_folder(128)
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "v_proj.lora_B" in name)
    weights[name][0, 0] = value
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{folder}/adapter_model.safetensors: {name} holds infinite or NaN values"):
        load_for_inference(str(base_folder), str(folder), device=CPU)


@pytest.mark.parametrize(
    ("capability", "stored", "expected"),
    [
        ((9, 0), torch.float16, torch.float16),
        ((9, 0), torch.float32, torch.float16),
        ((9, 0), None, torch.float16),
        ((9, 0), torch.bfloat16, torch.bfloat16),
        ((7, 5), torch.bfloat16, torch.float16),
    ],
)
def test_models_trained_in_bf16_keep_its_range(capability, stored, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert inference_dtype(torch.device("cuda"), stored) == expected
    assert inference_dtype(CPU, stored) == torch.float32


def test_the_dtype_of_a_base_decides_for_its_adapter(adapter_folder, own_base, monkeypatch):
    """An adapter's config has the dtype of its training."""
    asked = []
    monkeypatch.setattr(
        "component.loading.inference_dtype", lambda device, stored: asked.append(stored) or torch.float32
    )
    adapter, _ = adapter_folder(base=own_base)
    assert load_config(str(adapter)).dtype == torch.float32
    config = json.loads((own_base / "config.json").read_text())
    (own_base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    load_model(str(own_base))
    load_model(str(own_base), str(adapter))
    load_model(None, str(adapter))
    assert asked == [torch.bfloat16] * 3
