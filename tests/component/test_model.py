"""Loading a base: config and weights, in 4 bits or not, and what is rejected."""

import copy
import json
import os
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config

from component.error import UserError
from component.model import compute_dtype, load_base, load_config
from component.tokenizer import load_tokenizer
from tests.conftest import build_llama

CPU = torch.device("cpu")


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def ids(llama_config):
    return torch.randint(llama_config.vocab_size, (1, 100))


def change_config(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---- config and tokenizer


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nobody/no-such-model", ""])
def test_no_such_model(source):
    for load in (load_config, load_tokenizer):
        with pytest.raises(UserError, match="model_name_or_path") as error:
            load(source)
        assert repr(source) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "lamma"}'])
def test_invalid_configs(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="base_model") as error:
        load_config(str(tmp_path), field="base_model")
    assert str(tmp_path) in str(error.value)


def test_a_model_without_rotary_embedding(tmp_path):
    GPT2Config(n_layer=1, n_head=2, n_embd=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gpt2"):
        load_config(str(tmp_path))


def test_no_code_of_a_model_folder_runs(own_base):
    change_config(own_base, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (own_base / "evil.py").write_text("raise SystemExit('it ran')")
    config = load_config(str(own_base))
    load_base(str(own_base), config, dtype=torch.float32, load_in_4bit=False, device=CPU)
    change_config(own_base, model_type="evil")
    with pytest.raises(UserError, match="model_name_or_path"):
        load_config(str(own_base))


# ---- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_equals_stock(base_folder, ids, dtype):
    config = load_config(str(base_folder))
    ours = load_base(str(base_folder), config, dtype=dtype, load_in_4bit=False, device=CPU).eval()
    stock = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype).eval()
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    assert_close(logits(ours, ids), logits(stock, ids), atol=0, rtol=0)


@pytest.fixture(scope="module")
def wide_base(llama_config, tmp_path_factory) -> Path:
    """Rows of 64 weights, one block each; bitsandbytes computes shorter ones incorrectly on the CPU."""
    folder = tmp_path_factory.mktemp("wide")
    config = copy.deepcopy(llama_config)
    config.hidden_size, config.head_dim, config.initializer_range = 64, 16, 0.14
    build_llama(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_with_double_quantization(wide_base, dtype):
    config = load_config(str(wide_base))
    model = load_base(str(wide_base), config, dtype=dtype, load_in_4bit=True, device=CPU)
    layers = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    weights = load_file(wide_base / "model.safetensors")
    for layer in layers:
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == dtype
    # norms, embeddings and lm_head keep their dtype, so the residual stream is not fp32
    for name, parameter in model.named_parameters():
        if "proj" not in name:
            assert parameter.dtype == dtype
            assert_close(parameter, weights[name].to(dtype), atol=0, rtol=0)
    layer = model.model.layers[0].mlp.up_proj
    back = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    error = (back - weights["model.layers.0.mlp.up_proj.weight"]).abs().mean()
    assert 0.05 < error / weights["model.layers.0.mlp.up_proj.weight"].abs().mean() < 0.15


def test_nf4_equals_stock_bitsandbytes(wide_base, ids):
    """In training mode, before and after evaluation, in which stock bitsandbytes repacks weights on some CPUs."""
    config = load_config(str(wide_base))
    ours = load_base(str(wide_base), config, dtype=torch.float32, load_in_4bit=True, device=CPU).train()
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stock = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32, quantization_config=options).train()
    expected = logits(stock, ids)
    assert_close(logits(ours, ids), expected, atol=1e-6, rtol=1e-6)
    assert_close(logits(ours.eval(), ids), expected, atol=1e-6, rtol=1e-6)
    assert_close(logits(ours.train(), ids), expected, atol=1e-6, rtol=1e-6)


def test_the_callers_config_is_unchanged(base_folder):
    config = load_config(str(base_folder))
    before = config.to_json_string(use_diff=False)
    load_base(str(base_folder), config, dtype=torch.bfloat16, load_in_4bit=True, device=CPU)
    assert config.to_json_string(use_diff=False) == before
    assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_missing_weights_are_not_initialized(own_base, name, load_in_4bit):
    weights = load_file(own_base / "model.safetensors")
    del weights[name]
    save_file(weights, own_base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="model_name_or_path") as error:
        load_base(
            str(own_base), load_config(str(own_base)), dtype=torch.float32, load_in_4bit=load_in_4bit, device=CPU
        )
    assert name in str(error.value)


@pytest.mark.parametrize("damage", ["shape", "cut", "noise", "gone"])
def test_weights_that_do_not_load(own_base, damage):
    file = own_base / "model.safetensors"
    if damage == "shape":
        change_config(own_base, intermediate_size=96)
    elif damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "noise":
        file.write_bytes(b"\x00\xff" * 1000)
    else:
        file.unlink()
    with pytest.raises(UserError, match="model_name_or_path") as error:
        load_base(str(own_base), load_config(str(own_base)), dtype=torch.float32, load_in_4bit=False, device=CPU)
    assert str(own_base) in str(error.value)


def test_no_pickle_of_a_model_folder_runs(own_base, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    weights = load_file(own_base / "model.safetensors")
    (own_base / "model.safetensors").unlink()
    torch.save({**weights, "bomb": Bomb()}, own_base / "pytorch_model.bin")
    with pytest.raises(UserError, match="model_name_or_path"):
        load_base(str(own_base), load_config(str(own_base)), dtype=torch.float32, load_in_4bit=False, device=CPU)
    assert not (tmp_path / "exploded").exists()


def test_compute_dtype():
    assert compute_dtype(fp16=True, bf16=False) == torch.float16
    assert compute_dtype(fp16=False, bf16=True) == torch.bfloat16
    assert compute_dtype(fp16=False, bf16=False) == torch.float32


# ---- what somebody else wrote


def index_of(folder: Path, shard: str) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("how", ["..", "absolute", "link", "link to a folder"])
def test_k16_weights_outside_of_the_folder(own_base, tmp_path, how):
    shutil.copy(own_base / "model.safetensors", tmp_path / "other.safetensors")
    (own_base / "link.safetensors").symlink_to(tmp_path / "other.safetensors")
    (own_base / "sub").symlink_to(tmp_path)
    names = {"..": "../other.safetensors", "absolute": str(tmp_path / "other.safetensors")}
    index_of(own_base, names.get(how) or {"link": "link.safetensors"}.get(how, "sub/other.safetensors"))
    if how != "link":
        (own_base / "link.safetensors").unlink()
    with pytest.raises(UserError, match="leads out of it" if how in names else "outside of the folder"):
        load_base(
            str(own_base), load_config_without_links(own_base), dtype=torch.float32, load_in_4bit=False, device=CPU
        )


def load_config_without_links(folder: Path):
    link, target = folder / "link.safetensors", None
    if link.is_symlink():
        target = link.readlink()
        link.unlink()
    config = load_config(str(folder))
    if target:
        link.symlink_to(target)
    return config


def test_weights_in_a_folder_inside(own_base):
    (own_base / "sub").mkdir()
    index_of(own_base, "sub/part.safetensors")
    (own_base / "part.safetensors").rename(own_base / "sub" / "part.safetensors")
    load_base(str(own_base), load_config(str(own_base)), dtype=torch.float32, load_in_4bit=False, device=CPU)


@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 5}}']
)
def test_k15_an_index(own_base, text):
    (own_base / "model.safetensors").rename(own_base / "part.safetensors")
    (own_base / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model_name_or_path: the weights of .* do not load \(.*index.json"):
        load_base(str(own_base), load_config(str(own_base)), dtype=torch.float32, load_in_4bit=False, device=CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("in_4bit", [False, True])
def test_k15_weights_that_are_not_finite(own_base, value, in_4bit):
    weights = load_file(own_base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, own_base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds infinite or NaN values"):
        load_base(str(own_base), load_config(str(own_base)), dtype=torch.float32, load_in_4bit=in_4bit, device=CPU)


def test_k15_weights_that_fp16_cannot_hold(own_base):
    weights = load_file(own_base / "model.safetensors")
    weights["model.norm.weight"][0] = 1e5
    save_file(weights, own_base / "model.safetensors", metadata={"format": "pt"})
    options = {"load_in_4bit": False, "device": CPU}
    load_base(str(own_base), load_config(str(own_base)), dtype=torch.bfloat16, **options)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds infinite or NaN values in float16; .* bfloat16"):
        load_base(str(own_base), load_config(str(own_base)), dtype=torch.float16, **options)


# ---- quantized bases


@pytest.mark.parametrize(
    ("stored", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "fp8"}, "'fp8'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes' to 8 bits"),
        ({"quant_method": ["x"]}, r"\['x'\]"),
    ],
)
def test_k12_other_methods(own_base, stored, method):
    change_config(own_base, quantization_config=stored)
    with pytest.raises(UserError, match=f"are quantized by {method}, which is not supported; name the 16-bit model"):
        load_base(str(own_base), load_config(str(own_base)), dtype=torch.float32, load_in_4bit=False, device=CPU)


def test_k12_a_4bit_folder_loads_and_its_config_is_the_16bit_models(wide_base, tmp_path, ids):
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32, quantization_config=options)
    stock.save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    assert not hasattr(config, "quantization_config")
    for in_4bit in (False, True):
        ours = load_base(str(tmp_path), config, dtype=torch.float32, load_in_4bit=in_4bit, device=CPU).eval()
        assert_close(logits(ours, ids), logits(stock.train(), ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "zz", 3])
def test_k12_a_config_that_says_4_bits_of_16_bit_weights(own_base, kind):
    options = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    change_config(own_base, quantization_config=options)
    message = f"are not in 4 bits \\({kind}\\), as its config.json says; download the model again, or remove"
    with pytest.raises(UserError, match=message):
        load_base(str(own_base), load_config(str(own_base)), dtype=torch.float32, load_in_4bit=True, device=CPU)


def test_k12_gptq_that_says_so_in_another_file(own_base):
    file = own_base / "model.safetensors"
    weights = {name.replace("q_proj.weight", "q_proj.qweight"): value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"are quantized by GPTQ or AWQ, which is not supported; name the 16-bit"):
        load_base(str(own_base), load_config(str(own_base)), dtype=torch.float32, load_in_4bit=False, device=CPU)
