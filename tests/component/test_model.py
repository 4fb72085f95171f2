"""How base weights and tokenizer are loaded, and how far a model is stretched when nobody says so."""

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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
)

from component.adapter import add_adapter
from component.checkpoint import write_adapter, write_record
from component.error import UserError
from component.loading import extended_config_of, load_for_inference
from component.model import compute_dtype, load_base, load_config
from component.rope import extend_context
from component.tokenizer import any_pad_id, load_tokenizer
from tests.conftest import build_llama

CPU = torch.device("cpu")


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def ids(llama_config):
    return torch.randint(llama_config.vocab_size, (1, 100))


@pytest.fixture
def own_base(base_folder, tmp_path) -> Path:
    """A copy of the base, to be damaged."""
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


def change_config(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def adapter_folder(base_folder, tokenizer, tmp_path):
    """adapter_folder(target) -> (our adapter folder for a base stretched to `target` tokens, its model)."""

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


# ---- config and tokenizer


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nobody/no-such-model", ""])
def test_no_such_model(source):
    for load in (load_config, load_tokenizer):
        with pytest.raises(UserError, match="model_name_or_path") as error:
            load(source)
        assert repr(source) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "lamma"}'])
def test_a_config_that_is_none(tmp_path, text):
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


def test_tokenizer_keeps_its_vocabulary(base_folder):
    ours, stock = load_tokenizer(str(base_folder), 8192), AutoTokenizer.from_pretrained(base_folder)
    assert ours.get_vocab() == stock.get_vocab()
    assert ours.pad_token_id is None
    assert ours.padding_side == "right"
    assert ours.model_max_length == 8192
    assert any_pad_id(ours) == ours.eos_token_id
    ours.pad_token = "the"
    assert any_pad_id(ours) == ours.convert_tokens_to_ids("the")


def test_a_tokenizer_without_an_end(own_base, trained_bpe):
    PreTrainedTokenizerFast(tokenizer_object=trained_bpe, bos_token="<s>").save_pretrained(own_base)
    with pytest.raises(UserError, match="end-of-sequence"):
        load_tokenizer(str(own_base))


@pytest.mark.parametrize("damage", ["cut", "noise", "gone"])
def test_a_tokenizer_that_is_none(own_base, damage):
    file = own_base / "tokenizer.json"
    if damage == "cut":
        os.truncate(file, 1000)
    elif damage == "noise":
        file.write_text("{}")
    else:
        file.unlink()
        (own_base / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="model_name_or_path") as error:
        load_tokenizer(str(own_base))
    assert str(own_base) in str(error.value)
    with pytest.raises(UserError, match=r"^--tokenizer: "):
        load_tokenizer(str(own_base), field="--tokenizer")


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
    """Rows of 64 weights, a block each: bitsandbytes gets shorter ones wrong on the CPU."""
    folder = tmp_path_factory.mktemp("wide")
    config = copy.deepcopy(llama_config)
    config.hidden_size, config.head_dim, config.initializer_range = 64, 16, 0.14
    build_llama(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_with_double_quantisation(wide_base, dtype):
    config = load_config(str(wide_base))
    model = load_base(str(wide_base), config, dtype=dtype, load_in_4bit=True, device=CPU)
    layers = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    weights = load_file(wide_base / "model.safetensors")
    for layer in layers:
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == dtype
    # the norms, embeddings and lm_head stay as they are: nothing turns the residual stream into fp32
    for name, parameter in model.named_parameters():
        if "proj" not in name:
            assert parameter.dtype == dtype
            assert_close(parameter, weights[name].to(dtype), atol=0, rtol=0)
    layer = model.model.layers[0].mlp.up_proj
    back = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    error = (back - weights["model.layers.0.mlp.up_proj.weight"]).abs().mean()
    assert 0.05 < error / weights["model.layers.0.mlp.up_proj.weight"].abs().mean() < 0.15


def test_nf4_equals_stock_bitsandbytes(wide_base, ids):
    """In training mode; evaluation first or not. (Stock bitsandbytes repacks weights in evaluation on some CPUs.)"""
    config = load_config(str(wide_base))
    ours = load_base(str(wide_base), config, dtype=torch.float32, load_in_4bit=True, device=CPU).train()
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stock = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32, quantization_config=options).train()
    expected = logits(stock, ids)
    assert_close(logits(ours, ids), expected, atol=1e-6, rtol=1e-6)
    assert_close(logits(ours.eval(), ids), expected, atol=1e-6, rtol=1e-6)
    assert_close(logits(ours.train(), ids), expected, atol=1e-6, rtol=1e-6)


def test_the_callers_config_is_left_alone(base_folder):
    config = load_config(str(base_folder))
    before = config.to_json_string(use_diff=False)
    load_base(str(base_folder), config, dtype=torch.bfloat16, load_in_4bit=True, device=CPU)
    assert config.to_json_string(use_diff=False) == before
    assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_missing_weights_are_not_made_up(own_base, name, load_in_4bit):
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


# ---- how far it is stretched


@pytest.mark.parametrize("size", [None, 0, -1, 1, 64])
def test_a_base_is_left_alone_without_a_larger_context(base_folder, size):
    stock = AutoConfig.from_pretrained(base_folder)
    assert extended_config_of(str(base_folder), size).to_dict() == stock.to_dict()


@pytest.mark.parametrize(("size", "factor"), [(65, 2.0), (128, 2.0), (129, 3.0), (640, 10.0)])
def test_a_base_is_stretched_as_training_would(base_folder, size, factor):
    config = extended_config_of(str(base_folder), size)
    assert config.rope_parameters == {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    assert config.max_position_embeddings == 64


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_an_extended_model_says_how_far(base_folder, tmp_path, rope_type):
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


@pytest.mark.parametrize("target", [64, 128])
def test_our_adapter_is_not_stretched_otherwise(adapter_folder, base_folder, target):
    """Not even one that was trained on an unstretched base."""
    folder, _ = adapter_folder(target)
    for size in (None, target, target - 10):
        model, _ = load_for_inference(None, str(folder), context_size=size, device=CPU)
        assert model.config.rope_parameters.get("factor", 1.0) == target / 64
    for base in (None, str(base_folder)):
        with pytest.raises(UserError, match=f"context_size: {target + 1}"):
            load_for_inference(base, str(folder), context_size=target + 1, device=CPU)


# ---- a model to be used


def test_adapter_knows_its_base_and_its_context(adapter_folder, ids):
    folder, trained = adapter_folder(128)
    model, tokenizer = load_for_inference(None, str(folder), device=CPU)
    assert not model.training
    assert_close(logits(model, ids), logits(trained, ids), atol=1e-5, rtol=1e-5)
    assert tokenizer.eos_token == "</s>"


def test_another_base_may_be_named(adapter_folder, own_base, ids):
    """The base has moved since; the context is still the adapter's."""
    folder, trained = adapter_folder(128)
    record = json.loads((folder / "longqlora.json").read_text())
    (folder / "longqlora.json").write_text(json.dumps({**record, "base_model": "/gone"}))
    with pytest.raises(UserError, match="/gone"):
        load_for_inference(None, str(folder), device=CPU)
    model, _ = load_for_inference(str(own_base), str(folder), device=CPU)
    assert_close(logits(model, ids), logits(trained, ids), atol=1e-5, rtol=1e-5)


def test_another_projects_adapter_needs_its_base_and_context(adapter_folder, base_folder, ids):
    folder, trained = adapter_folder(128)
    for name in ("longqlora.json", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"model_name_or_path: missing.*which base model"):
        load_for_inference(None, str(folder), device=CPU)
    model, _ = load_for_inference(str(base_folder), str(folder), context_size=128, device=CPU)
    assert_close(logits(model, ids), logits(trained, ids), atol=1e-5, rtol=1e-5)
    unstretched, _ = load_for_inference(str(base_folder), str(folder), device=CPU)
    assert (logits(unstretched, ids) - logits(trained, ids)).abs().mean() > 1e-2


def test_an_adapter_cut_off_while_saving_is_refused(adapter_folder):
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
