"""train.py with all memory options equals memory_plan: false: losses, adapter and evaluation.

python -m pytest tests/end_to_end/test_memory_options.py
python -m pytest tests/end_to_end/test_memory_options.py -m slow     # under the deepspeed launcher
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig

from component.memory.layer import LeanLayer
from component.train.trainer import LongQLoRATrainer
from tests.conftest import ROOT, TEXTS, build_llama

MEMORY_OPTIONS = {
    "keep_layers": 1,
    "keep_attention_layers": 1,
    "keep_attention_output": True,
    "offload_activations": True,
    "mlp_tile_tokens": 17,
    "loss_chunk_tokens": 11,
}
OFF = {"memory_plan": False}
BASIC = {
    "sft": False,
    "max_seq_length": 90,
    "model_max_length": 128,
    "group_size": 24,
    "max_steps": 10,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_steps": 100,
    "lora_rank": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "load_in_4bit": False,
    "report_to": "none",
    "use_cpu": True,
    "seed": 1,
}


@pytest.fixture(scope="module")
def base(base_folder, llama_config, tmp_path_factory) -> Path:
    """Four layers, and rows of 64 weights, which bitsandbytes needs for 4-bit evaluation on the CPU."""
    folder = tmp_path_factory.mktemp("four-layers")
    config = copy.deepcopy(llama_config)
    config.hidden_size, config.head_dim, config.initializer_range, config.num_hidden_layers = 64, 16, 0.14, 4
    build_llama(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def basic(base, tmp_path_factory) -> dict:
    """Ten steps of two micro-batches of two rows of different lengths; evaluation after steps 4, 8 and 10."""
    folder = tmp_path_factory.mktemp("data")
    texts = [(text + " ") * times for text in TEXTS for times in (1, 3)]
    for name, rows in (("train.jsonl", texts), ("eval.jsonl", texts[:5])):
        (folder / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    files = {"train_file": str(folder / "train.jsonl"), "eval_file": str(folder / "eval.jsonl")}
    return {**BASIC, **files, "model_name_or_path": str(base)}


@pytest.fixture
def run(run_program, basic, tmp_path):
    """run(**changes): train in this process; the output folder and the printed text."""

    def start(**changes) -> tuple[Path, str]:
        number = len(list(tmp_path.glob("*.yaml")))
        out, file = tmp_path / f"out-{number}", tmp_path / f"run-{number}.yaml"
        file.write_text(yaml.safe_dump({**basic, "output_dir": str(out), **changes}))
        outcome = run_program("train.py", "--train_args_file", file)
        assert outcome.status == 0, outcome.err
        return out, outcome.out

    return start


def curve(folder: Path, key: str = "loss") -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[key] for entry in history if key in entry}


def assert_same_run(ours: Path, theirs: Path, tolerance: float = 2e-5) -> None:
    losses, expected = curve(ours), curve(theirs)
    assert losses == pytest.approx(expected, abs=tolerance)
    first, last = min(expected), max(expected)
    assert expected[first] - expected[last] > 0.05 * (last - first)  # the loss decreases
    evaluated = curve(theirs, "eval_loss")
    assert evaluated
    assert curve(ours, "eval_loss") == pytest.approx(evaluated, abs=tolerance)
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == weight.dtype
        # Adam normalizes gradients, so noise dominates where they are nearly zero
        assert float((found[name] - weight).abs().mean()) < 10 * tolerance, name


@pytest.mark.parametrize(
    "changes",
    [{}, {"load_in_4bit": True}, {"use_shift_short_attention": False, "train_embedding": True, "train_norm": True}],
    ids=["S2", "NF4", "full attention, embeddings and norms"],
)
def test_same_curve(run, changes):
    (ours, printed), (theirs, plain) = run(**changes, **MEMORY_OPTIONS), run(**changes, **OFF)
    assert_same_run(ours, theirs)
    assert curve(ours).keys() == set(range(1, 11))
    assert curve(ours, "eval_loss").keys() == {4, 8, 10}
    assert (
        "full (inputs and attention outputs offloaded to CPU memory) in 2, selective (MLP recomputed) in 1, "
        "none in 1 of 4 layers; MLP in tiles of 17 tokens, loss in chunks of 11" in printed
    )
    assert "no plan (memory_plan: false)" in plain


def test_a_models_sliding_window_is_kept(run, base, tmp_path):
    """Without S2-Attn, a Mistral with a sliding window of 16 tokens trains with it, by transformers' attention."""
    config = MistralConfig.from_dict(AutoConfig.from_pretrained(base).to_dict() | {"sliding_window": 16})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mistral")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "mistral")
    changes = {"model_name_or_path": str(tmp_path / "mistral"), "use_shift_short_attention": False, "max_steps": 3}
    (ours, printed), (theirs, _) = run(**changes, **MEMORY_OPTIONS), run(**changes, **OFF)
    assert curve(ours) == pytest.approx(curve(theirs), abs=2e-5)
    assert "attention outputs" not in printed
    config.sliding_window = None
    config.save_pretrained(tmp_path / "mistral")
    wide, printed = run(**changes, **MEMORY_OPTIONS)
    assert abs(curve(wide)[1] - curve(ours)[1]) > 1e-4
    assert "attention outputs" in printed


def test_bf16(run):
    """Plain `python train.py` trains and evaluates under autocast, with fp32 trainable parameters."""
    changes = {"bf16": True, "load_in_4bit": False, "train_embedding": True, "train_norm": True, "max_steps": 4}
    ours, theirs = (
        run(**changes, learning_rate=2e-3, **memory_options)[0] for memory_options in (MEMORY_OPTIONS, OFF)
    )
    for key in ("loss", "eval_loss"):
        assert curve(ours, key) == pytest.approx(curve(theirs, key), abs=0.03)
        assert curve(ours, key)


def test_dropout_after_resuming(run, tmp_path):
    """A resumed run draws the same dropout masks as an uninterrupted one."""
    changes = {**MEMORY_OPTIONS, "lora_dropout": 0.3, "save_steps": 3, "max_steps": 6, "eval_strategy": "no"}
    uninterrupted, _ = run(**changes)
    shutil.copytree(uninterrupted / "checkpoint-3", tmp_path / "stopped" / "checkpoint-3")
    run(**changes, output_dir=str(tmp_path / "stopped"), resume_from_checkpoint="auto")
    assert curve(tmp_path / "stopped") == pytest.approx(curve(uninterrupted), abs=1e-6)
    assert len(curve(uninterrupted)) == 6


@pytest.fixture
def checkpointed(monkeypatch) -> list[bool]:
    """For each run, whether transformers' activation checkpointing was on."""
    seen = []
    original = LongQLoRATrainer.train

    def train(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        layers = self.model.get_base_model().get_decoder().layers
        seen.append(any(getattr(layer, "gradient_checkpointing", False) for layer in layers))
        assert all(isinstance(layer, LeanLayer) for layer in layers) == (not seen[-1])
        return result

    monkeypatch.setattr(LongQLoRATrainer, "train", train)
    return seen


def test_who_recomputes(run, checkpointed, monkeypatch):
    """The plan, even with gradient_checkpointing: true; transformers if the plan falls back."""
    short = {"max_steps": 2, "eval_steps": 1, "lora_dropout": 0.2}
    run(**short, **MEMORY_OPTIONS, gradient_checkpointing=True)
    assert checkpointed == [False]
    monkeypatch.setattr("component.memory.apply.use_memory_plan", lambda *args, **kwargs: "a reason")
    fallen, printed = run(**short, **MEMORY_OPTIONS)
    assert checkpointed == [False, True]
    assert "no plan (a reason)" in printed
    assert len(curve(fallen)) == 2


# ---- under the deepspeed launcher


def deepspeed(values: dict, folder: Path, config: str, processes: int = 1, **changes) -> tuple[Path, str]:
    number = len(list(folder.glob("*.yaml")))
    out, file = folder / f"out-{number}", folder / f"run-{number}.yaml"
    options = {"deepspeed": f"./train_args/deepspeed/{config}.json", "output_dir": str(out), **changes}
    file.write_text(yaml.safe_dump({**values, **options}))
    programs = Path(sys.executable).parent  # on CPU the deepspeed launcher starts one process
    launcher = [programs / "deepspeed"] if processes == 1 else [programs / "torchrun", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, "train.py", "--train_args_file", str(file)],
        cwd=ROOT, env={**environment, "HF_DATASETS_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return out, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"train_embedding": True, "train_norm": True}], ids=["LoRA", "all"])
@pytest.mark.parametrize("config", ["deepspeed_config_s2_no_offload", "deepspeed_config_s2"])
def test_zero_2(basic, tmp_path, config, changes):
    ours, printed = deepspeed(basic, tmp_path, config, **changes, **MEMORY_OPTIONS)
    theirs, _ = deepspeed(basic, tmp_path, config, **changes, **OFF)
    assert "MLP in tiles of 17 tokens" in printed
    assert_same_run(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"train_norm": True, "train_embedding": True}], ids=["lora", "more"])
def test_zero_3(basic, tmp_path, changes):
    """All options under ZeRO-3, where whole layers are gathered, equal no plan under ZeRO-2."""
    values = {**basic, "target_modules": "q_proj,v_proj,down_proj", **changes}
    ours, printed = deepspeed(values, tmp_path, "deepspeed_config_s3", **MEMORY_OPTIONS)
    theirs, _ = deepspeed(values, tmp_path, "deepspeed_config_s2_no_offload", **OFF)
    assert "MLP in tiles of 17 tokens" in printed
    assert_same_run(ours, theirs)


@pytest.mark.slow
def test_k10_a_4_bit_base_under_zero_3(basic, tmp_path):
    """Two processes, each with half of the NF4 bytes, train as one process without DeepSpeed does."""
    rows = Path(basic["train_file"]).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text(
        "".join(rows[:8]), encoding="utf-8"
    )  # two steps an epoch, none of them smaller
    values = {**basic, "train_file": str(tmp_path / "rows.jsonl"), "load_in_4bit": True, "max_steps": 4}
    values["eval_strategy"] = "no"
    both, printed = deepspeed(values, tmp_path, "deepspeed_config_s3", processes=2, gradient_accumulation_steps=1)
    assert "NF4" in printed
    alone, _ = deepspeed(values, tmp_path, "deepspeed_config_s2_no_offload", **OFF)
    assert curve(both) == pytest.approx(curve(alone), abs=1e-5)
    assert curve(both, "grad_norm") == pytest.approx(curve(alone, "grad_norm"), rel=1e-4)
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (both, alone))
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert weight.any()
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def test_workload_under_zero_3(base, monkeypatch):
    """Counted on a model that ZeRO-3 must not partition."""
    from transformers.integrations import deepspeed as integration

    from component.adapter import check_targets_early
    from component.memory.workload import workload
    from component.model import load_config

    config = load_config(str(base))
    options = {"target_names": None, "rank": 4, "train_norm": True, "tokens": 90, "group": 24}
    expected = workload(config, **options)
    monkeypatch.setattr("transformers.modeling_utils.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(integration, "is_deepspeed_zero3_enabled", lambda: True)
    assert workload(config, **options) == expected
    check_targets_early(config, ["q_proj"])
    assert expected.trained > 0
    assert torch.get_default_dtype() == torch.float32
