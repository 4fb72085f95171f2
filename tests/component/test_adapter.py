"""Trained parameters, saved adapters in stock PEFT, and adapters of the original projects."""

import copy
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config

from component.adapter import add_adapter, check_targets, full_copies, linear_names, load_adapter, trainable_counts
from component.attention.interface import use_shift_short_attention
from component.checkpoint import write_adapter
from component.error import UserError
from component.model import load_base, load_config
from component.rope import extend_context
from component.storage.tensor_reader import read_weights

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
CPU = torch.device("cpu")
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}  # qwen2: biases in q, k and v


@pytest.fixture(scope="module")
def bases(tmp_path_factory, llama_config):
    """bases(family, tied): a folder with a tiny base."""
    made: dict[tuple[str, bool], Path] = {}

    def make(family: str = "llama", tied: bool = False) -> Path:
        if (family, tied) not in made:
            shape = {
                key: getattr(llama_config, key)
                for key in (
                    "vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id",
                )
            }  # fmt: skip
            # rows of 64 weights, one NF4 block
            config = FAMILIES[family](**shape, hidden_size=64, initializer_range=0.14, tie_word_embeddings=tied)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                model = AutoModelForCausalLM.from_config(config)
            made[family, tied] = tmp_path_factory.mktemp(f"{family}-{'tied' if tied else 'untied'}")
            model.save_pretrained(made[family, tied])
        return made[family, tied]

    return make


def base_model(folder: Path, *, dtype=torch.float32, load_in_4bit=False, config=None):
    return load_base(
        str(folder), config or load_config(str(folder)), dtype=dtype, load_in_4bit=load_in_4bit, device=CPU
    )


def adapted(model, **options) -> PeftModel:
    return add_adapter(model, **{"rank": 4, "alpha": 16, "dropout": 0.05, **options})


def perturb(model: nn.Module) -> list[str]:
    """Add noise to every trainable weight, in place of training; their names."""
    moved = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
            moved.append(name)
    return moved


def some_ids(model, length: int = 40) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, length))


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


# ---- target layers


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_names_exclude_the_head(bases, family, tied, load_in_4bit):
    model = base_model(bases(family, tied), dtype=torch.bfloat16, load_in_4bit=load_in_4bit)
    assert linear_names(model) == LINEAR


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_every_linear_layer_but_the_head_gets_lora(bases, family, load_in_4bit):
    model = adapted(base_model(bases(family), load_in_4bit=load_in_4bit))
    with_lora = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(with_lora) == 2 * 7
    assert not any("lm_head" in name for name in with_lora)
    assert trainable_counts(model).keys() == {"LoRA"}


@pytest.mark.parametrize(
    "names", [["q_proj"], ["q_proj", "down_proj"], ["self_attn.q_proj"], ["layers.1.mlp.up_proj"], LINEAR]
)
def test_valid_targets(tiny_llama, names):
    check_targets(tiny_llama, names)


@pytest.mark.parametrize("wrong", ["q_porj", "embed_tokens", "proj", "self_attn", "input_layernorm"])
def test_invalid_targets(tiny_llama, wrong):
    """Even one among valid ones, which PEFT would silently ignore."""
    with pytest.raises(UserError) as error:
        check_targets(tiny_llama, ["q_proj", wrong])
    for fragment in ("target_modules", repr(wrong), *LINEAR):
        assert fragment in str(error.value)
    with pytest.raises(UserError, match="target_modules"):
        adapted(tiny_llama, target_names=["q_proj", wrong])


def test_the_nearest_name_is_suggested(tiny_llama):
    with pytest.raises(UserError, match="did you mean q_proj"):
        check_targets(tiny_llama, ["q_porj"])


def test_a_subset_of_targets(tiny_llama):
    model = adapted(tiny_llama, target_names=["v_proj", "layers.1.mlp.up_proj"])
    with_lora = sorted(name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name)
    assert [name.removeprefix("base_model.model.model.") for name in with_lora] == [
        "layers.0.self_attn.v_proj", "layers.1.mlp.up_proj", "layers.1.self_attn.v_proj",
    ]  # fmt: skip


# ---- trained parameters


def test_lora_is_configured_as_asked(tiny_llama):
    model = adapted(tiny_llama, rank=8, alpha=32, dropout=0.1)
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    assert layer.lora_A["default"].weight.shape == (8, 32)
    assert layer.lora_B["default"].weight.shape == (16, 8)  # two of four heads
    assert layer.scaling["default"] == 32 / 8
    assert layer.lora_dropout["default"].p == 0.1
    assert trainable_counts(model) == {"LoRA": sum(p.numel() for p in model.parameters() if p.requires_grad)}


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_counts(bases, tied):
    """Two layers: q and o 64 to 64, k and v 64 to 32, gate, up and down 64 to 64; five norms of 64."""
    model = adapted(base_model(bases("llama", tied)), rank=4, train_embedding=True, train_norm=True)
    lora = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 64))
    matrices = 1 if tied else 2
    assert trainable_counts(model) == {"LoRA": lora, "embeddings": matrices * 384 * 64, "norms": 5 * 64}


@pytest.mark.parametrize(
    ("tied", "expected"), [(False, ["embed_tokens", "lm_head"]), (True, ["embed_tokens"])], ids=["untied", "tied"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_copies(bases, family, tied, expected):
    model = base_model(bases(family, tied))
    norms = ["input_layernorm", "norm", "post_attention_layernorm"]
    assert full_copies(model, False, False) == []
    assert full_copies(model, True, False) == expected
    assert full_copies(model, False, True) == norms
    assert full_copies(model, True, True) == sorted(expected + norms)


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_trained_parameters_are_fp32_and_others_unchanged(bases, tied, load_in_4bit):
    """Base weights keep their dtype and values; an untrained adapter does not change the logits."""
    folder = bases("llama", tied)
    base = base_model(folder, dtype=torch.bfloat16, load_in_4bit=load_in_4bit)
    untouched = copy.deepcopy(base)
    ids = some_ids(base)
    expected = logits(untouched, ids)
    model = adapted(base, train_embedding=True, train_norm=True)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name or ".modules_to_save." in name)
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
        else:
            assert parameter.dtype in (torch.bfloat16, torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(logits(model, ids), expected, atol=0.15, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_only_trained_parameters_get_gradients(bases, tied):
    model = adapted(base_model(bases("llama", tied)), train_embedding=True, train_norm=True).train()
    perturb(model)  # with B = 0, A gets no gradient
    ids = some_ids(model)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


def test_tied_embeddings_stay_tied_while_training(bases):
    """The adapter has one copy for both."""
    model = adapted(base_model(bases("llama", True)), train_embedding=True)
    trained = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad and "lora" not in n}
    assert len(trained) == 1
    core = model.get_base_model()
    source, target = core.get_input_embeddings(), core.get_output_embeddings()
    before = target(torch.ones(64))
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in trained:
                parameter.fill_(0.5)
    assert_close(source(torch.tensor([7])), torch.full((1, 64), 0.5))
    assert_close(target(torch.ones(64)), torch.full((384,), 32.0))
    assert not torch.equal(before, target(torch.ones(64)))


# ---- saved adapters in stock PEFT

WHAT = {
    "lora": {},
    "norms": {"train_norm": True},
    "embeddings": {"train_embedding": True},
    "all": {"train_embedding": True, "train_norm": True},
}


def saved_adapter(folder: Path, base: Path, tokenizer, *, target: int = 64, **options) -> PeftModel:
    """An adapter with random weights on `base` extended to `target` tokens, written to `folder`."""
    extended = load_config(str(base))
    extend_context(extended, target)
    config = copy.deepcopy(extended)
    use_shift_short_attention(config, 16)
    config.use_cache = False
    model = adapted(base_model(base, config=config), **options)
    moved = perturb(model)
    assert moved
    write_adapter(folder, model, tokenizer, extended)
    return model


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_stock_peft_loads_what_we_save(bases, tokenizer, tmp_path, tied, what):
    """In one call, without LongQLoRA code; that call uses the base's config, without scaled positions."""
    base = bases("llama", tied)
    model = saved_adapter(tmp_path / "out", base, tokenizer, **WHAT[what])
    ids = some_ids(model)
    expected = logits(model, ids)
    stock = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_close(logits(stock, ids), expected, atol=1e-5, rtol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert (logits(plain, ids) - expected).abs().mean() > 0.1
    for omitted in set(WHAT[what]):  # everything that was trained changes the logits
        assert (logits(without(stock, omitted), ids) - expected).abs().mean() > 1e-3


def without(model: PeftModel, kind: str) -> PeftModel:
    """`model` with the base's own norms (`train_norm`) or embeddings."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and ("norm" in name) == (kind == "train_norm"):
            module.modules_to_save["default"].load_state_dict(module.original_module.state_dict())
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_stock_peft_on_a_base_built_from_the_adapters_config(bases, tokenizer, tmp_path, family, tied):
    """With the extended config of the adapter folder, logits at the extended length equal the saved model's."""
    base = bases(family, tied)
    model = saved_adapter(tmp_path / "out", base, tokenizer, target=200, **WHAT["all"])
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters["factor"] == 4.0
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32), tmp_path / "out"
    )
    assert stock.get_base_model().config._attn_implementation == "sdpa"
    for length in (5, 200):
        ids = some_ids(model, length)
        expected = logits(model, ids)
        assert_close(logits(stock, ids), expected, atol=1e-5, rtol=1e-5)
    unscaled = PeftModel.from_pretrained(base_model(base), tmp_path / "out")
    assert (logits(unscaled, ids) - expected).abs().mean() > 1e-2


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_we_load_what_we_save(bases, tokenizer, tmp_path, tied, what):
    base = bases("llama", tied)
    model = saved_adapter(tmp_path / "out", base, tokenizer, target=200, **WHAT[what])
    ids = some_ids(model, 200)
    expected = logits(model, ids)
    loaded = load_adapter(base_model(base, config=load_config(str(tmp_path / "out"))), str(tmp_path / "out"))
    assert_close(logits(loaded, ids), expected, atol=1e-5, rtol=1e-5)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    merged = loaded.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_modules())
    assert_close(logits(merged, ids), expected, atol=1e-4, rtol=1e-4)
    assert (logits(base_model(base, config=load_config(str(tmp_path / "out"))), ids) - expected).abs().mean() > 0.1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_trained_on_4bit_weights(bases, tokenizer, tmp_path, tied):
    """It contains no base weight, whatever the base's dtype."""
    base = bases("llama", tied)
    model = adapted(base_model(base, load_in_4bit=True), **WHAT["all"])
    perturb(model)
    write_adapter(tmp_path / "out", model, tokenizer, load_config(str(base)))
    ids = some_ids(model)
    loaded = load_adapter(base_model(base, load_in_4bit=True), str(tmp_path / "out"))
    assert_close(logits(loaded, ids), logits(model, ids), atol=1e-4, rtol=1e-4)
    stock = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    own, theirs = dict(model.named_parameters()), dict(stock.named_parameters())
    trained = [name for name, parameter in own.items() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2 + 5 + (1 if tied else 2)
    for name in trained:
        assert_close(theirs[name], own[name], atol=0, rtol=0, check_device=False)


def test_the_file_contains_only_trained_weights(bases, tokenizer, tmp_path):
    for what, copies in (("lora", 0), ("norms", 5), ("embeddings", 2), ("all", 7)):
        saved_adapter(tmp_path / what, bases(), tokenizer, **WHAT[what])
        weights = load_file(tmp_path / what / "adapter_model.safetensors")
        assert len(weights) == 2 * 7 * 2 + copies
        assert all(value.dtype == torch.float32 for value in weights.values())


# ---- missing, unexpected and damaged weights


@pytest.fixture
def saved(bases, tokenizer, tmp_path) -> Path:
    saved_adapter(tmp_path / "out", bases(), tokenizer, **WHAT["all"])
    return tmp_path / "out"


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


LORA_KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    "missing",
    [LORA_KEY, "base_model.model.model.norm.weight", "base_model.model.model.embed_tokens.weight",
     "base_model.model.lm_head.weight"],
)  # fmt: skip
def test_a_missing_weight_is_rejected(bases, saved, missing):
    rewrite(saved, lambda weights: weights.pop(missing))
    with pytest.raises(UserError, match="missing") as error:
        load_adapter(base_model(bases()), str(saved))
    assert str(saved) in str(error.value)


@pytest.mark.parametrize(
    "extra",
    ["base_model.model.model.layers.2.mlp.up_proj.lora_B.weight", "base_model.model.model.rotary.lora_A.weight",
     "something"],
)  # fmt: skip
def test_an_unexpected_weight_is_rejected(bases, saved, extra):
    rewrite(saved, lambda weights: weights.update({extra: torch.zeros(64, 4)}))
    with pytest.raises(UserError, match="1 weights are unexpected") as error:
        load_adapter(base_model(bases()), str(saved))
    assert str(saved) in str(error.value)
    assert extra.removeprefix("base_model.model.").removesuffix(".weight") in str(error.value)


def test_a_weight_of_another_shape_is_rejected(bases, saved):
    rewrite(saved, lambda weights: weights.update({LORA_KEY: torch.zeros(65, 4)}))
    with pytest.raises(UserError, match="does not fit") as error:
        load_adapter(base_model(bases()), str(saved))
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_damaged_files(bases, saved, name, damage):
    file = saved / name
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"\x00\xff" * 300)
    with pytest.raises(UserError, match=str(saved)):
        load_adapter(base_model(bases()), str(saved))


def test_a_folder_without_an_adapter(bases, tmp_path):
    with pytest.raises(UserError, match="is not an adapter"):
        load_adapter(base_model(bases()), str(tmp_path))


# ---- the original projects' files


@pytest.fixture
def original(bases, tmp_path):
    """original(prefix): a folder as written by LongQLoRA (PEFT 0.4) and LongLoRA, and the expected merged weights."""

    def make(prefix: str | None = None) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = tmp_path / "original"
        folder.mkdir()
        config = {
            "auto_mapping": None,
            "base_model_name_or_path": "/public/model/Llama-2-7b-hf",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": 8,
            "revision": None,
            "target_modules": ["v_proj", "up_proj", "q_proj", "gate_proj", "down_proj", "o_proj", "k_proj"],
            "task_type": "CAUSAL_LM",
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        merged = {name: value.clone() for name, value in load_file(bases() / "model.safetensors").items()}
        lora, extras = {}, {}
        for name in sorted(merged):
            if name.split(".")[-2] in config["target_modules"]:
                path, (rows, columns) = name.removesuffix(".weight"), merged[name].shape
                a, b = 0.3 * torch.randn(8, columns), 0.3 * torch.randn(rows, 8)
                lora[f"base_model.model.{path}.lora_A.weight"] = a
                lora[f"base_model.model.{path}.lora_B.weight"] = b
                merged[name] += 16 / 8 * b @ a
            elif prefix is not None and ("norm" in name or "embed" in name):
                merged[name] += 0.3 * torch.randn_like(merged[name])
                extras[prefix + name] = merged[name].clone()
        torch.save(lora, folder / "adapter_model.bin")
        if prefix is not None:
            assert len(extras) == 6
            torch.save(extras, folder / "trainable_params.bin")
        return folder, merged

    return make


@pytest.mark.parametrize("prefix", [None, "", "base_model.model."], ids=["adapter-alone", "bare", "prefixed"])
def test_adapters_of_the_original_projects(bases, original, prefix):
    folder, weights = original(prefix)
    loaded = load_adapter(base_model(bases()), str(folder))
    reference = AutoModelForCausalLM.from_pretrained(bases(), dtype=torch.float32)
    ids = some_ids(reference)
    untouched = logits(reference, ids)
    reference.load_state_dict(weights, strict=True)
    expected = logits(reference, ids)
    assert_close(logits(loaded, ids), expected, atol=1e-4, rtol=1e-4)
    assert (expected - untouched).abs().mean() > 0.1
    assert_close(logits(loaded.merge_and_unload(), ids), expected, atol=1e-4, rtol=1e-4)


def test_an_unknown_extra_weight_is_rejected(bases, original):
    folder, _ = original("")
    extras = torch.load(folder / "trainable_params.bin", weights_only=True)
    torch.save({**extras, "model.norms.weight": torch.zeros(64)}, folder / "trainable_params.bin")
    with pytest.raises(UserError, match=r"trainable_params\.bin: model\.norms\.weight"):
        load_adapter(base_model(bases()), str(folder))


def test_an_added_pad_token_is_named(bases, original):
    """LongLoRA added a pad token and resized the embedding."""
    folder, _ = original("")
    extras = torch.load(folder / "trainable_params.bin", weights_only=True)
    torch.save({**extras, "model.embed_tokens.weight": torch.zeros(385, 64)}, folder / "trainable_params.bin")
    with pytest.raises(UserError, match=r"embed_tokens.*\(385, 64\).*\(384, 64\).*pad token"):
        load_adapter(base_model(bases()), str(folder))


class Bomb:
    """Unpickling it calls os.mkdir."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("name", ["adapter_model.bin", "trainable_params.bin"])
def test_no_code_is_unpickled(bases, original, tmp_path, name):
    folder, _ = original("")
    weights = torch.load(folder / name, weights_only=True)
    torch.save({**weights, "bomb": Bomb(str(tmp_path / "exploded"))}, folder / name)
    with pytest.raises(UserError, match=name):
        load_adapter(base_model(bases()), str(folder))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [[torch.zeros(3)], {"state": {"model.norm.weight": torch.zeros(32)}}, {"a": 1}])
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin"):
        read_weights(tmp_path / "adapter_model.bin")


def test_safetensors_are_preferred(bases, saved, tmp_path):
    """A folder with both has a converted copy; the pickle is not opened."""
    (saved / "adapter_model.bin").write_bytes(b"no pickle at all")
    load_adapter(base_model(bases()), str(saved))


def test_loading_does_not_change_the_folder(bases, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    load_adapter(base_model(bases()), str(saved))
    assert {file.name for file in saved.iterdir()} == {file.name for file in (tmp_path / "copy").iterdir()}
    for file in saved.iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()


def test_loading_an_adapter_raises_no_warning(base_folder, adapter_folder):
    model = LlamaForCausalLM.from_pretrained(base_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, str(adapter_folder))
