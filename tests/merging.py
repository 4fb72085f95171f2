"""Bases and adapters to merge, from PEFT and from the original projects."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from component.merge.plan import plan_merge
from component.merge.write import write_merged
from component.model import load_config
from component.storage.tensor_reader import model_tensors

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def save_adapter(folder: Path, base: Path, **options) -> PeftModel:
    """Save a randomly initialized adapter with PEFT; returns the model in memory."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 16, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(model, LoraConfig(**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def merged(folder: Path, base: Path, adapter: Path, dtype=torch.float32, base_weights="fp16", **options):
    """The tensors of a merge by component.merge, read back."""
    folder.mkdir(exist_ok=True)
    plan = plan_merge(str(base), str(adapter), load_config(str(base)), dtype=dtype, base_weights=base_weights)
    write_merged(folder, plan, **options)
    return {name: stored.read() for name, stored in model_tensors(str(folder)).items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def copied(base: Path, folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def original(folder: Path, base: Path, prefix: str | None) -> dict[str, torch.Tensor]:
    """Write an adapter in the format of PEFT 0.4 and LongLoRA; returns the expected merged weights."""
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
