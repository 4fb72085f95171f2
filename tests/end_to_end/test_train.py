"""train.py from end to end, on CPU: what it computes, what it writes, and resuming after it is killed.

    python -m pytest tests/end_to_end/test_train.py
    python -m pytest tests/end_to_end/test_train.py -m slow     # deepspeed (compiles for a minute), torchrun

Most runs are forked from a process that has imported everything: a fresh interpreter needs seven seconds of imports
for half a second of training. Some tests start the command itself.
"""

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from component.checkpoint import claimed_output_dir
from component.rope import extend_context
from component.train.settings import parse_arguments
from tests.conftest import ROOT, build_llama
from tests.reference.shift_short import LOOP
from tests.train_run import (
    BASIC,
    GROUP,
    TRAIN_TEXTS,
    executable,
    finish,
    launched,
    logged,
    losses,
    record,
    stock_model,
    token_ids,
)

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ADAPTER_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "longqlora.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHECKPOINT_FILES = ADAPTER_FILES | {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
RUN_FILES = ADAPTER_FILES | {"README.md", "trainer_state.json", "train_results.json", "all_results.json"}
EVAL_TEXTS = [
    "Half of the heads attend inside groups; the other half attend inside groups moved by half a group. " * 7,
    "Dogs.",
    "Somebody had to sharpen a great many feathers, long before the longest of books was written.",
    "The range of positions.",
    "«Größe», naïve café, 東京 2024",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "train_file": write_texts(folder / "train.jsonl", TRAIN_TEXTS),
        "eval_file": write_texts(folder / "eval.jsonl", EVAL_TEXTS),
    }


def write_texts(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def basic(base_folder, files) -> dict:
    """A run of three steps, each over all four texts, so their order does not matter."""
    return {**BASIC, "model_name_or_path": str(base_folder), "train_file": files["train_file"]}


@pytest.fixture(scope="module")
def plain_run(train, basic, files, tmp_path_factory) -> Path:
    """The output folder of the basic run with evaluation."""
    out = tmp_path_factory.mktemp("plain") / "out"
    finish(train({**basic, "output_dir": str(out), "eval_file": files["eval_file"], "per_device_eval_batch_size": 3}))
    return out


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def summed_loss(model, ids: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in nats of each token of a row (1, T) but the first: no padding, no batch."""
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    return F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")


# ---- what it computes


def test_losses_and_adapter_equal_a_plain_loop(plain_run, base_folder):
    """Token-weighted loss, clipping at 0.3, AdamW, and a slow loop for shift short attention."""
    base = stock_model(base_folder, group_size=GROUP, _attn_implementation=LOOP)
    # B starts at zero, so A gets no gradient in the first step: checkpoint-1 has the initial A
    model = PeftModel.from_pretrained(base, plain_run / "checkpoint-1", is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    rows = token_ids(base_folder, TRAIN_TEXTS)
    labels = sum(row.shape[1] - 1 for row in rows)
    expected = {}
    for step in (1, 2, 3):
        loss = sum(summed_loss(model, row) for row in rows) / labels
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        expected[step] = loss.item()
    assert losses(plain_run) == pytest.approx(expected, abs=2e-5)
    assert expected[1] - expected[3] > 0.05  # the loss decreases, so the comparison is meaningful
    saved = load_file(plain_run / "adapter_model.safetensors")
    own = {name.replace(".default", ""): parameter for name, parameter in model.named_parameters()}
    for name, weight in saved.items():
        torch.testing.assert_close(weight, own[name].data, atol=2e-4, rtol=0)


def test_first_loss_is_token_weighted(plain_run, base_folder):
    """In the first step LoRA adds nothing: the loss is that of the extended base under S2-Attn."""
    model = stock_model(base_folder, group_size=GROUP, _attn_implementation=LOOP).train()
    full = stock_model(base_folder).eval()
    rows = token_ids(base_folder, TRAIN_TEXTS)
    with torch.no_grad():
        sums = torch.stack([summed_loss(model, row) for row in rows])
        sums_of_full = torch.stack([summed_loss(full, row) for row in rows])
    counts = torch.tensor([row.shape[1] - 1 for row in rows])
    by_token, by_row = float(sums.sum() / counts.sum()), float((sums / counts).mean())
    assert losses(plain_run)[1] == pytest.approx(by_token, abs=1e-5)
    assert abs(by_token - by_row) > 1e-2
    assert abs(by_token - float(sums_of_full.sum() / counts.sum())) > 1e-3  # training uses S2-Attn


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (2, 2)])
def test_accumulation_does_not_change_the_run(train, basic, plain_run, tmp_path, batch, accumulation):
    changed = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "save_steps": 100}
    finish(train({**basic, **changed, "output_dir": str(tmp_path / "out")}))
    assert losses(tmp_path / "out") == pytest.approx(losses(plain_run), abs=1e-5)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", plain_run))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-4, rtol=0)
    assert record(tmp_path / "out")["trained_tokens"] == record(plain_run)["trained_tokens"]


def reference_eval_loss(out: Path, base: Path) -> float:
    """Token-weighted loss of stock PEFT on the extended stock base: eager full attention, one row at a time."""
    model = PeftModel.from_pretrained(stock_model(base, _attn_implementation="eager"), out).eval()
    rows = token_ids(base, EVAL_TEXTS)
    with torch.no_grad():
        return sum(float(summed_loss(model, row)) for row in rows) / sum(row.shape[1] - 1 for row in rows)


def test_eval_loss(train, basic, files, plain_run, base_folder, tmp_path):
    """Five rows in batches of three and of one."""
    out = tmp_path / "out"
    finish(train({**basic, "output_dir": str(out), "eval_file": files["eval_file"], "per_device_eval_batch_size": 1}))
    expected = reference_eval_loss(plain_run, base_folder)
    for folder in (plain_run, out):
        measured = json.loads((folder / "eval_results.json").read_text())
        assert measured["eval_loss"] == pytest.approx(expected, abs=1e-5)
        assert measured["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_too_few_samples_for_a_batch(train, basic, tmp_path):
    """K6a: with dataloader_drop_last no step was trained, and an untrained adapter was saved with status 0."""
    values = {
        **basic,
        "per_device_train_batch_size": 5,
        "dataloader_drop_last": True,
        "output_dir": str(tmp_path / "o"),
    }
    done = train({**values, "max_steps": -1, "num_train_epochs": 1})
    assert done.returncode == 1, done.stdout
    assert "has 4 samples and a batch 5, so no step would be trained" in done.stdout
    assert not list((tmp_path / "o").glob("adapter_*"))


def test_a_checkpoint_without_optimizer_is_not_resumed(train, basic, tmp_path):
    """K6b: with save_only_model a resumed run restarted Adam and the schedule without a word."""
    values = {**basic, "save_only_model": True, "output_dir": str(tmp_path / "o"), "resume_from_checkpoint": "auto"}
    finish(train({**values, "max_steps": 1}))
    for resume in ("auto", str(tmp_path / "o/checkpoint-1")):
        done = train({**values, "max_steps": 2, "resume_from_checkpoint": resume})
        assert done.returncode == 1, done.stdout
        assert "checkpoint-1 has no optimizer state (it was saved with save_only_model: true)" in done.stdout


def test_a_second_run_of_one_output_dir(train, basic, tmp_path):
    """K6c: refused in one sentence while the first lives; what a killed one left blocks nobody."""
    (tmp_path / ".o.lock").touch()  # as a killed run leaves it
    with claimed_output_dir(str(tmp_path / "o")):
        done = train({**basic, "output_dir": str(tmp_path / "o")})
        assert done.returncode == 1, done.stdout
        assert f"output_dir: another process is writing {tmp_path}/o" in done.stdout
        assert "Loading weights" not in done.stdout
    finish(train({**basic, "output_dir": str(tmp_path / "o")}))
    assert not (tmp_path / ".o.lock").exists()


def test_numbers_inside_of_a_value(train, basic, tmp_path):
    """K13a: 1e-6 in lr_scheduler_kwargs is a string in YAML 1.1, and was a traceback at the first step."""
    values = {**basic, "output_dir": str(tmp_path / "o"), "lr_scheduler_type": "cosine_with_min_lr"}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values) + "lr_scheduler_kwargs: {min_lr: 1e-6}\n")
    _, training_args = parse_arguments(["--train_args_file", str(file)])
    assert training_args.lr_scheduler_kwargs == {"min_lr": 1e-6}
    _, training_args = parse_arguments(["--train_args_file", str(file), "--lr_scheduler_kwargs", "{min_lr: 2E-5}"])
    assert training_args.lr_scheduler_kwargs == {"min_lr": 2e-5}


def test_the_first_evaluation_has_no_dropout(train, basic, files, tmp_path):
    """K4c: of a resumed run, before its first step: it measures what the run measured when it was interrupted."""
    values = {**basic, "lora_dropout": 0.5, "eval_file": files["eval_file"], "eval_strategy": "steps", "eval_steps": 2}
    values |= {"output_dir": str(tmp_path / "out"), "resume_from_checkpoint": "auto"}
    finish(train({**values, "max_steps": 2}))
    finish(train({**values, "max_steps": 3, "eval_on_start": True}))
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    measured = [row["eval_loss"] for row in history if "eval_loss" in row and row["step"] == 2]
    assert len(measured) >= 2
    assert measured == pytest.approx([measured[0]] * len(measured), abs=1e-6)


def run_out_of_memory_when_evaluating() -> None:
    from transformers import Trainer

    def evaluate(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    Trainer.evaluate = evaluate


def test_an_evaluation_that_fails_loses_nothing(train, basic, files, plain_run, tmp_path):
    """K4a: the trained adapter is saved before it is evaluated."""
    values = {**basic, "eval_file": files["eval_file"], "output_dir": str(tmp_path / "out")}
    done = train(values, run_out_of_memory_when_evaluating)
    assert done.returncode == 1, done.stdout
    assert "error: eval_file: the GPU is out of memory at per_device_eval_batch_size 1" in done.stdout
    assert "Traceback" not in done.stdout
    assert names(tmp_path / "out") >= ADAPTER_FILES
    found, expected = (load_file(out / "adapter_model.safetensors") for out in (tmp_path / "out", plain_run))
    assert all(weight.equal(found[name]) for name, weight in expected.items())


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"bf16_full_eval": True},
        pytest.param({"fp16_full_eval": True, **EVERY_STEP}, marks=pytest.mark.slow),
        {"bf16_full_eval": True, "eval_on_start": True, **EVERY_STEP},
        pytest.param(
            {"per_device_eval_batch_size": 3, "eval_accumulation_steps": 1, **EVERY_STEP}, marks=pytest.mark.slow
        ),
        pytest.param({"prediction_loss_only": True, **EVERY_STEP}, marks=pytest.mark.slow),
        pytest.param({"eval_do_concat_batches": False, **EVERY_STEP, "eval_delay": 1}, marks=pytest.mark.slow),
        pytest.param(
            {"bf16_full_eval": True, "load_best_model_at_end": True, "metric_for_best_model": "loss", **EVERY_STEP},
            marks=pytest.mark.slow,
        ),
        {"load_in_4bit": True, "bf16_full_eval": True, **EVERY_STEP},
        {"lora_dropout": 0.1, "eval_on_start": True, **EVERY_STEP},
    ],
    ids=lambda keys: " ".join(keys) or "none",
)
def test_k4d_evaluation_changes_no_weight(train, basic, files, tmp_path, keys):
    """Saved weights equal, to the bit and in dtype, those of the same run without evaluation."""
    base = {name: keys[name] for name in ("load_in_4bit", "lora_dropout") if name in keys}
    alone, evaluated = tmp_path / "alone", tmp_path / "evaluated"
    values = {**basic, **base, "train_embedding": True, "train_norm": True, "max_steps": 2}
    finish(train({**values, "output_dir": str(alone)}))
    finish(train({**values, "eval_file": files["eval_file"], **keys, "output_dir": str(evaluated)}))
    measured = json.loads((evaluated / "eval_results.json").read_text())
    assert 0 < measured["eval_loss"] < 20
    for folder in ("", "checkpoint-1", "checkpoint-2"):
        found, expected = (load_file(out / folder / "adapter_model.safetensors") for out in (evaluated, alone))
        if not folder and "load_best_model_at_end" in keys:
            best = json.loads((evaluated / "trainer_state.json").read_text())["best_global_step"]
            expected = load_file(alone / f"checkpoint-{best}" / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert len(found) > 10
        for name, weight in expected.items():
            assert found[name].dtype == weight.dtype
            assert torch.equal(found[name], weight), name


def wrapping_in_ddp_is_an_error() -> None:
    from torch.nn.parallel import DistributedDataParallel

    def refuse(self, *args, **kwargs):
        raise AssertionError("wrapped in DDP")

    DistributedDataParallel.__init__ = refuse


def test_k11_one_process_has_no_ddp(train, basic, tmp_path):
    """Whose buckets are another copy of all gradients."""
    finish(train({**basic, "max_steps": 1, "output_dir": str(tmp_path / "out")}, wrapping_in_ddp_is_an_error))


def test_evaluation_during_training_changes_nothing(train, basic, files, plain_run, base_folder, tmp_path):
    changed = {"eval_strategy": "steps", "eval_steps": 1, "eval_file": files["eval_file"]}
    finish(train({**basic, **changed, "output_dir": str(tmp_path / "out")}))
    assert losses(tmp_path / "out") == pytest.approx(losses(plain_run), abs=1e-6)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    measured = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert measured.keys() == {1, 2, 3}
    for step, loss in measured.items():
        expected = reference_eval_loss(tmp_path / "out" / f"checkpoint-{step}", base_folder)
        assert loss == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def wide_base(llama_config, base_folder, tmp_path_factory) -> Path:
    """Rows of 64 weights, which stock bitsandbytes needs for 4-bit evaluation on the CPU."""
    folder = tmp_path_factory.mktemp("wide")
    config = copy.deepcopy(llama_config)
    config.hidden_size, config.head_dim, config.initializer_range = 64, 16, 0.14
    build_llama(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    return folder


def test_k12_from_a_4bit_folder_to_a_merged_model(train, basic, wide_base, run_program, tmp_path):
    """The adapter is merged into the 16-bit model, and used on either; the 4-bit folder can't be merged into."""
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base, adapter, target = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    stock = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32, quantization_config=options)
    stock.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(wide_base)
    tokenizer.save_pretrained(base)
    finish(train({**basic, "model_name_or_path": str(base), "load_in_4bit": True, "output_dir": str(adapter)}))
    merge = ["script/merge_lora.py", "--adapter_name_or_path", adapter, "--save_path", target, "--dtype", "float32"]
    refused = run_program(*merge)
    assert refused.status == 1
    assert "are quantized to 4 bits, and a merge writes 16 or 32 bits; name the 16-bit model" in refused.err
    assert run_program(*merge, "--model_name_or_path", wide_base).status == 0
    ids = torch.tensor([tokenizer("The quick brown fox").input_ids])
    config = AutoConfig.from_pretrained(adapter)
    plain = AutoModelForCausalLM.from_pretrained(wide_base, config=config, dtype=torch.float32)
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        expected = PeftModel.from_pretrained(plain, adapter).eval()(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - before).abs().max() > 0.01
    for model in (base, wide_base):
        words = ["--model_name_or_path", model, "--adapter_name_or_path", adapter, "--prompt", "The"]
        assert run_program("script/inference/inference.py", *words, "--max_new_tokens", 2).status == 0


def test_the_best_checkpoint_has_the_smallest_perplexity(train, basic, files, tmp_path):
    """A learning rate far too high makes each step worse than the one before."""
    changes = {"eval_file": files["eval_file"], "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.5}
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "perplexity"}
    finish(train({**basic, "output_dir": str(tmp_path), **changes}))
    found = logged(tmp_path, "eval_perplexity")
    best = min(found, key=found.__getitem__)
    assert found[best] < max(found.values())
    kept, saved = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / f"checkpoint-{best}", tmp_path)
    )
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    told = record(tmp_path)
    assert told["steps"] == best, "of the adapter beside it, not of the run"
    assert told["trained_tokens"] == record(tmp_path / f"checkpoint-{best}")["trained_tokens"]


def test_a_stream_is_shuffled_by_data_seed(train, basic, tmp_path):
    """`data_seed` decides, where it is set, and `seed` otherwise."""
    first = {}
    for name, seeds in {
        "both": {"seed": 1, "data_seed": 5},
        "same": {"seed": 5},
        "other": {"seed": 5, "data_seed": 6},
    }.items():
        changes = {
            "streaming": True,
            "per_device_train_batch_size": 1,
            "max_steps": 1,
            "output_dir": str(tmp_path / name),
        }
        finish(train({**basic, **changes, **seeds}))
        first[name] = losses(tmp_path / name)[1]
    assert first["both"] == first["same"] != first["other"]


def test_evaluation_in_4bit(train, basic, files, wide_base, tmp_path):
    """Equals stock bitsandbytes and PEFT, and does not change the following steps."""
    changed = {"load_in_4bit": True, "model_name_or_path": str(wide_base)}
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "eval_file": files["eval_file"]}
    with_eval, without = tmp_path / "with", tmp_path / "without"
    finish(train({**basic, **changed, **evaluating, "output_dir": str(with_eval)}))
    finish(train({**basic, **changed, "output_dir": str(without)}))
    assert losses(with_eval) == pytest.approx(losses(without), abs=1e-6)
    base = AutoModelForCausalLM.from_pretrained(
        wide_base,
        config=AutoConfig.from_pretrained(with_eval),
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    model = PeftModel.from_pretrained(base, with_eval).eval()
    rows = token_ids(wide_base, EVAL_TEXTS)
    with torch.no_grad():
        expected = sum(float(summed_loss(model, row)) for row in rows) / sum(row.shape[1] - 1 for row in rows)
    measured = json.loads((with_eval / "eval_results.json").read_text())["eval_loss"]
    assert measured == pytest.approx(expected, abs=2e-3)  # batches of eight and of one use different kernels
    plain = reference_eval_loss(with_eval, wide_base)
    assert abs(expected - plain) > 5e-3  # unquantized weights


# ---- what it writes


def test_exact_files(plain_run):
    checkpoints = {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert names(plain_run) == RUN_FILES | checkpoints | {"eval_results.json"}
    for name in checkpoints:
        assert names(plain_run / name) == CHECKPOINT_FILES
    assert not list(plain_run.rglob("training_args.bin"))


def test_config_is_extended_and_stock(plain_run, base_folder):
    expected = json.loads((base_folder / "config.json").read_text())
    expected["rope_parameters"] = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
    for folder in (plain_run, plain_run / "checkpoint-2"):
        assert json.loads((folder / "config.json").read_text()) == expected
        config = AutoConfig.from_pretrained(folder)
        assert config.max_position_embeddings == 64  # vLLM multiplies it by the factor
        assert not hasattr(config, "group_size")
        assert LlamaForCausalLM._from_config(config).config._attn_implementation == "sdpa"


def test_config_of_a_4bit_run_has_no_quantization(train, basic, tmp_path):
    out = tmp_path / "out"
    finish(train({**basic, "output_dir": str(out), "load_in_4bit": True, "save_steps": 2}))
    for folder in (out, out / "checkpoint-2"):
        config = json.loads((folder / "config.json").read_text())
        assert not {"quantization_config", "group_size", "_attn_implementation", "attn_implementation"} & config.keys()
    assert len(losses(out)) == 3
    assert losses(out)[3] < losses(out)[1]


def test_record(plain_run, base_folder):
    expected = {
        "base_model": str(base_folder.resolve()),
        "rope_type": "linear",
        "rope_factor": 3.0,
        "group_size": GROUP,
        "steps": 3,
        "trained_tokens": 3 * sum(row.shape[1] for row in token_ids(base_folder, TRAIN_TEXTS)),
    }
    written = record(plain_run)
    assert {key: written[key] for key in expected} == expected
    assert {"torch", "transformers", "peft", "bitsandbytes", "deepspeed"} <= written["versions"].keys()
    assert written["versions"]["torch"] == torch.__version__
    second = record(plain_run / "checkpoint-2")
    assert second["steps"] == 2
    assert second["trained_tokens"] * 3 == written["trained_tokens"] * 2


def test_tokenizer_has_the_base_vocabulary_and_the_new_length(plain_run, base_folder):
    """tokenizer.json is the base's, without the truncation of training samples."""
    assert json.loads((plain_run / "tokenizer.json").read_text()) == json.loads(
        (base_folder / "tokenizer.json").read_text()
    )
    saved, original = (AutoTokenizer.from_pretrained(folder) for folder in (plain_run, base_folder))
    assert saved.get_vocab() == original.get_vocab()
    assert saved.pad_token is None
    assert saved.model_max_length == 192
    text = "«Größe», 東京"
    assert saved(text).input_ids == original(text).input_ids


def test_yarn_and_full_attention(train, basic, base_folder, tmp_path):
    """The loss equals stock full attention."""
    changed = {"use_shift_short_attention": False, "rope_type": "yarn", "max_steps": 1}
    finish(train({**basic, **changed, "output_dir": str(tmp_path / "out")}))
    written = record(tmp_path / "out")
    assert (written["rope_type"], written["rope_factor"], written["group_size"]) == ("yarn", 3.0, None)
    model = AutoModelForCausalLM.from_pretrained(base_folder, config=AutoConfig.from_pretrained(tmp_path / "out"))
    rows = token_ids(base_folder, TRAIN_TEXTS)
    with torch.no_grad():
        loss = sum(float(summed_loss(model.eval(), row)) for row in rows) / sum(row.shape[1] - 1 for row in rows)
    assert losses(tmp_path / "out")[1] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(("asked", "kept"), [(None, "yarn"), ("linear", "linear")])
def test_an_extended_model_keeps_its_rope_type(train, basic, base_folder, tmp_path, asked, kept):
    """Fine-tuning a yarn model with a YAML without rope_type."""
    model = shutil.copytree(base_folder, tmp_path / "extended")
    config = AutoConfig.from_pretrained(model)
    extend_context(config, 192, "yarn")
    config.save_pretrained(model)
    settings = {"model_name_or_path": str(model), "max_steps": 1, "output_dir": str(tmp_path / "out")}
    printed = finish(train({**basic, **settings} | ({"rope_type": asked} if asked else {})))
    assert f"192 -> 192 tokens (yarn x 3 -> {kept} x 3)" in printed
    assert ("linear x 3 replaces yarn x 3" in printed) == (asked == "linear")
    assert record(tmp_path / "out")["rope_type"] == kept


@pytest.fixture(scope="module")
def llama3_base(base_folder, tmp_path_factory) -> Path:
    """Scaled as Llama 3: pretrained at 64 tokens, then with factor 4 at 128."""
    folder = tmp_path_factory.mktemp("llama3") / "base"
    shutil.copytree(base_folder, folder)
    config = AutoConfig.from_pretrained(folder)
    llama3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    config.rope_parameters = {**llama3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config.max_position_embeddings = 128
    config.save_pretrained(folder)
    return folder


def test_k5a_a_llama3_base_is_extended_by_its_own_factor(train, basic, llama3_base, tmp_path):
    out = tmp_path / "out"
    settings = {"model_name_or_path": str(llama3_base), "max_steps": 1, "output_dir": str(out)}
    printed = finish(train({**basic, **settings}))
    assert "128 -> 192 tokens (llama3 x 4 -> llama3 x 8)" in printed
    assert "warning" not in printed
    written = json.loads((out / "config.json").read_text())
    assert (written["rope_parameters"]["factor"], written["max_position_embeddings"]) == (8.0, 256)
    assert (record(out)["rope_type"], record(out)["rope_factor"]) == ("llama3", 8.0)
    refused = train({**basic, **settings, "output_dir": str(tmp_path / "no"), "rope_type": "linear"})
    assert refused.returncode == 1
    assert "error: rope_type: linear would replace the llama3 scaling" in refused.stdout


def test_k5b_a_linear_base_is_never_scaled_less(train, basic, base_folder, tmp_path):
    model = shutil.copytree(base_folder, tmp_path / "base")
    config = AutoConfig.from_pretrained(model)
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    config.max_position_embeddings = 96
    config.save_pretrained(model)
    settings = {"model_name_or_path": str(model), "max_steps": 1, "output_dir": str(tmp_path / "out")}
    printed = finish(train({**basic, **settings}))
    assert "384 -> 192 tokens (linear x 4 -> linear x 4)" in printed
    assert '"original_max_position_embeddings": 24' in printed
    assert record(tmp_path / "out")["rope_factor"] == 4.0


def test_k5c_dynamic_positions_do_not_depend_on_earlier_rows(train, basic, base_folder, tmp_path):
    """Losses equal those of a fresh model for each row, and a killed run's those of one that was not."""
    texts = [TRAIN_TEXTS[3], TRAIN_TEXTS[1] * 2, TRAIN_TEXTS[3][:250]]
    file = write_texts(tmp_path / "train.jsonl", texts)
    values = {**basic, "rope_type": "dynamic", "per_device_train_batch_size": 1, "train_file": file}
    values |= {"learning_rate": 1e-12, "use_shift_short_attention": False, "max_steps": 6}
    finish(train({**values, "output_dir": str(tmp_path / "unbroken")}))
    config = AutoConfig.from_pretrained(tmp_path / "unbroken")
    expected, rows = set(), token_ids(base_folder, texts)
    assert sum(64 < row.shape[1] < 150 for row in rows) == 2  # beyond the base's length, and of different lengths
    for row in rows:
        model = AutoModelForCausalLM.from_pretrained(base_folder, config=copy.deepcopy(config)).eval()
        with torch.no_grad():
            expected.add(round(float(summed_loss(model, row)) / (row.shape[1] - 1), 4))
    assert {round(loss, 4) for loss in losses(tmp_path / "unbroken").values()} == expected
    values |= {"output_dir": str(tmp_path / "out"), "resume_from_checkpoint": "auto"}
    assert train(values, DieAt("step", 4)).returncode == -signal.SIGKILL
    finish(train(values))
    assert losses(tmp_path / "out") == losses(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size: 2; set it to 1: dynamic positions"),
        ({"packing": True}, "packing: true; set it to false: dynamic positions"),
    ],
)
def test_k5_dynamic_positions_in_batches(train, basic, tmp_path, changed, words):
    values = {**basic, "rope_type": "dynamic", "per_device_train_batch_size": 1, "output_dir": str(tmp_path / "out")}
    refused = train({**values, **changed})
    assert refused.returncode == 1
    assert f"error: {words}" in refused.stdout


# ---- what is trained


def test_the_last_steps_train_with_full_attention(train, basic, plain_run, base_folder, tmp_path):
    always, never = tmp_path / "always", tmp_path / "never"
    finish(train({**basic, "full_attention_ratio": 1, "output_dir": str(always)}))
    without = {"use_shift_short_attention": False, "full_attention_ratio": 0.5}
    printed = finish(train({**basic, **without, "output_dir": str(never)}))
    assert "full in every step; full_attention_ratio has no effect" in printed
    shifted, full = losses(plain_run), losses(never)
    assert abs(shifted[1] - full[1]) > 1e-3
    assert losses(always) == pytest.approx(full, abs=1e-5)
    for last, first_full in ((0.3, 3), (0.66, 2)):
        out = tmp_path / str(last)
        printed = finish(train({**basic, "full_attention_ratio": last, "output_dir": str(out)}))
        assert f"full attention in the last {100 * last:g} % of the steps and in evaluation" in printed
        mixed = losses(out)
        for step in range(1, first_full):
            assert mixed[step] == pytest.approx(shifted[step], abs=1e-6)
        assert abs(mixed[first_full] - shifted[first_full]) > 1e-3
    # also after resuming
    shutil.rmtree(out / "checkpoint-3")
    finish(train({**basic, "full_attention_ratio": 0.66, "output_dir": str(out), "resume_from_checkpoint": True}))
    assert losses(out) == pytest.approx(mixed, abs=1e-6)


def test_sft_trains_on_answers_and_drops_samples_without_labels(train, basic, base_folder, tmp_path):
    lines = [
        {"input": "Who jumps?", "output": "The fox."},
        {"input": "Over whom?", "output": "Over the lazy dog, who does not mind at all."},
        {"input": "A question that fills the window. " * 40, "output": "Cut off."},
        {"input": "Nothing to answer?", "output": "  "},
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    changed = {"sft": True, "train_file": str(file), "max_seq_length": 190, "per_device_train_batch_size": 2}
    printed = finish(train({**basic, **changed, "output_dir": str(out)}))
    assert "2 of 4 lines dropped" in printed
    assert losses(out)[3] < losses(out)[1]

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = stock_model(base_folder, group_size=GROUP, _attn_implementation=LOOP).train()
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    total, count = 0.0, 0
    for line in lines[:2]:
        prompt = f"{system}\nUSER: {line['input']}\nASSISTANT: "
        asked = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = [*tokenizer(line["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert len(asked) + len(answer) <= 190
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([asked + answer]), use_cache=False).logits[0]
        total += float(F.cross_entropy(logits[len(asked) - 1 : -1], torch.tensor(answer), reduction="sum"))
        count += len(answer)
    assert losses(out)[1] == pytest.approx(total / count, abs=1e-5)


@pytest.fixture(scope="module")
def tied_base(base_folder, llama_config, tmp_path_factory) -> Path:
    """The base with tied embeddings."""
    folder = tmp_path_factory.mktemp("tied")
    model = stock_model(base_folder, factor=None, tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_norms_train(train, basic, base_folder, tied_base, tmp_path, tied, load_in_4bit):
    base, out = tied_base if tied else base_folder, tmp_path / "out"
    changed = {"train_embedding": True, "train_norm": True, "load_in_4bit": load_in_4bit, "save_steps": 100}
    finish(train({**basic, **changed, "model_name_or_path": str(base), "output_dir": str(out)}))
    assert losses(out)[3] < losses(out)[1]
    saved = load_file(out / "adapter_model.safetensors")
    before = load_file(base / "model.safetensors")
    copies = {name for name in before if "norm" in name or "embed_tokens" in name or "lm_head" in name}
    assert len(copies) == 5 + (1 if tied else 2)
    for name in copies:
        found = saved[f"base_model.model.{name}"]
        assert found.dtype == torch.float32
        assert not torch.equal(found, before[name].float()), f"{name} has not changed"
    if not load_in_4bit:  # stock PEFT continues from the saved weights with a lower loss
        model = PeftModel.from_pretrained(stock_model(base, group_size=GROUP, _attn_implementation=LOOP), out).train()
        rows = token_ids(base, TRAIN_TEXTS)
        with torch.no_grad():
            loss = sum(float(summed_loss(model, row)) for row in rows) / sum(row.shape[1] - 1 for row in rows)
        assert loss < losses(out)[3] - 1e-3


def test_only_the_targets_train(train, basic, tmp_path):
    changed = {"target_modules": "q_proj, v_proj", "max_steps": 1, "save_steps": 100}
    finish(train({**basic, **changed, "output_dir": str(tmp_path / "out")}))
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved} == {"q_proj", "v_proj"}
    assert len(saved) == 2 * 2 * 2  # layers, targets, A and B
    assert all(weight.any() for name, weight in saved.items() if "lora_B" in name)


def test_all_linear_layers_train_by_default(plain_run):
    saved = load_file(plain_run / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved} == LINEAR
    assert len(saved) == 2 * 7 * 2
    assert all(weight.any() for name, weight in saved.items() if "lora_B" in name)


def test_recomputation_changes_nothing(train, basic, plain_run, tmp_path):
    changed = {"gradient_checkpointing": True, "save_steps": 100}
    printed = finish(train({**basic, **changed, "output_dir": str(tmp_path / "out")}))
    assert losses(tmp_path / "out") == pytest.approx(losses(plain_run), abs=1e-5)
    assert "requires_grad=True" not in printed  # torch's warning that a recomputed block has no gradient


@pytest.mark.parametrize(
    ("changed", "fragments"),
    [
        ({"target_modules": "q_proj,k_porj"}, ["target_modules", "k_porj", "k_proj"]),
        ({"model_name_or_path": "/nowhere/model"}, ["model_name_or_path", "/nowhere/model"]),
        ({"lora_rnak": 8}, ["lora_rnak", "lora_rank"]),
    ],
)
def test_mistakes_end_in_one_message(train, basic, tmp_path, changed, fragments):
    run = train({**basic, **changed, "output_dir": str(tmp_path / "out")})
    assert run.returncode == 1
    assert "Traceback" not in run.stdout
    for fragment in fragments:
        assert fragment in run.stdout


# ---- killed and resumed runs


@pytest.fixture(scope="module")
def long_basic(base_folder, tmp_path_factory) -> dict:
    """Eight steps, each less than half an epoch, with dropout, accumulation, shuffling and learning-rate decay."""
    texts = [f"{text} {number}" for number in range(3) for text in TRAIN_TEXTS][:11]
    return {
        **BASIC,
        "model_name_or_path": str(base_folder),
        "train_file": write_texts(tmp_path_factory.mktemp("long") / "train.jsonl", texts),
        "lora_dropout": 0.05,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear",
        "max_steps": 8,
        "save_steps": 2,
    }


@pytest.fixture(scope="module")
def uninterrupted(train, long_basic, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    finish(train({**long_basic, "output_dir": str(out)}))
    assert len(losses(out)) == 8
    return out


class DieAt:
    """Kills the training process at a given step, in the middle of an operation."""

    def __init__(self, what: str, step: int):
        self.what, self.step = what, step

    def __call__(self) -> None:
        """In the training process: wrap the function of that operation."""
        import train
        from component.train import trainer

        owner, name = {
            "adapter": (trainer, "write_adapter"),
            "weights": (PeftModel, "save_pretrained"),
            "optimizer": (torch, "save"),
            "state": (trainer.Trainer, "_save_rng_state"),
            "record": (trainer, "write_record"),
            "removal": (shutil, "rmtree"),
            "step": (trainer.Trainer, "training_step"),
        }[self.what]
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if self.is_time(args):
                self.leave_half(args)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        assert train.main
        setattr(owner, name, wrapped)

    def is_time(self, args: tuple) -> bool:
        if self.what == "step":
            return args[0].state.global_step == self.step
        if self.what == "removal":
            return Path(args[0]).name == f"checkpoint-{self.step}"
        return any(f"checkpoint-{self.step}" in str(argument) for argument in args if not isinstance(argument, dict))

    def leave_half(self, args: tuple) -> None:
        if self.what == "adapter":
            args[0].mkdir(exist_ok=True)
            (args[0] / "adapter_model.safetensors").write_bytes(b"half a file")
        elif self.what == "optimizer":
            Path(args[1]).write_bytes(b"half a file")
        elif self.what == "removal":
            (Path(args[0]) / "adapter_model.safetensors").unlink()


def is_complete(checkpoint: Path, reference: Path) -> bool:
    """Whether a checkpoint has the files of the uninterrupted run's, by name and size."""
    theirs = {file.name: file.stat().st_size for file in (reference / checkpoint.name).iterdir()}
    del theirs["trainer_state.json"], theirs["longqlora.json"]  # they contain times, paths and arguments
    ours = {file.name: file.stat().st_size for file in checkpoint.iterdir() if file.name in theirs}
    return ours == theirs and names(checkpoint) == CHECKPOINT_FILES


@pytest.mark.parametrize(
    ("what", "step"),
    [("step", 5), ("adapter", 4), ("weights", 4), ("optimizer", 4), ("state", 6), ("record", 4), ("removal", 2)],
)
def test_killed_run_resumes_with_the_same_losses(train, long_basic, uninterrupted, tmp_path, what, step):
    """And with save_total_limit: 1 there is always one complete checkpoint after the first."""
    out = tmp_path / "out"
    values = {**long_basic, "output_dir": str(out), "save_total_limit": 1, "resume_from_checkpoint": "auto"}
    killed = train(values, DieAt(what, step))
    assert killed.returncode == -signal.SIGKILL, killed.stdout[-3000:]
    complete = {folder.name for folder in out.glob("checkpoint-*") if is_complete(folder, uninterrupted)}
    assert len(complete) == 1
    finish(train(values))
    assert losses(out) == pytest.approx(losses(uninterrupted), abs=1e-6)
    assert {folder.name for folder in out.glob("checkpoint-*")} == {"checkpoint-8"}
    assert names(out) == RUN_FILES | {"checkpoint-8"}
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (out, uninterrupted))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0)
    assert record(out)["trained_tokens"] == record(uninterrupted)["trained_tokens"]


@pytest.mark.parametrize("damaged", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "longqlora.json"])
def test_incomplete_checkpoints_are_skipped(train, long_basic, uninterrupted, tmp_path, damaged):
    """E.g. after a full disk: the latest checkpoint has a truncated file."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    for file in out.iterdir():
        if file.is_file():
            file.unlink()
    shutil.rmtree(out / "checkpoint-8")
    file = out / "checkpoint-6" / damaged
    os.truncate(file, file.stat().st_size // 2)
    finish(train({**long_basic, "output_dir": str(out), "resume_from_checkpoint": "auto"}))
    assert losses(out) == pytest.approx(losses(uninterrupted), abs=1e-6)
    assert {file.name for file in (out / "checkpoint-6").iterdir()} == CHECKPOINT_FILES
    assert is_complete(out / "checkpoint-6", uninterrupted)


@pytest.mark.parametrize(
    ("tied", "precision"),
    [
        pytest.param(False, {"load_in_4bit": True, "bf16": True}, marks=pytest.mark.slow),
        (True, {"load_in_4bit": True}),
        pytest.param(True, {"bf16": True}, marks=pytest.mark.slow),
        (False, {}),
    ],
    ids=["untied-nf4-bf16", "tied-nf4", "tied-bf16", "untied"],
)
def test_trained_embeddings_and_norms_resume(train, long_basic, tied_base, tmp_path, tied, precision):
    changed = {"train_embedding": True, "train_norm": True, "max_steps": 4, **precision}
    if tied:
        changed["model_name_or_path"] = str(tied_base)
    reference, out = tmp_path / "reference", tmp_path / "out"
    finish(train({**long_basic, **changed, "output_dir": str(reference)}))
    shutil.copytree(reference / "checkpoint-2", out / "checkpoint-2")
    finish(train({**long_basic, **changed, "output_dir": str(out), "resume_from_checkpoint": "auto"}))
    assert losses(out) == pytest.approx(losses(reference), abs=1e-6)
    assert len(losses(out)) == 4
    before, ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (reference / "checkpoint-2", out, reference)
    )
    assert ours.keys() == theirs.keys() == before.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0)
        assert not torch.equal(before[name], weight), f"{name} has not changed"


def test_rotation_keeps_the_complete_checkpoint(train, long_basic, uninterrupted, tmp_path):
    """Not an incomplete checkpoint-6, in a run that resumes from 4 and ends at 5."""
    out = tmp_path / "out"
    for step in (2, 4, 6):
        shutil.copytree(uninterrupted / f"checkpoint-{step}", out / f"checkpoint-{step}")
    (out / "checkpoint-6" / "longqlora.json").unlink()
    changed = {"max_steps": 5, "save_total_limit": 1, "resume_from_checkpoint": "auto", "output_dir": str(out)}
    finish(train({**long_basic, **changed}))
    assert {folder.name for folder in out.glob("checkpoint-*")} == {"checkpoint-5"}
    assert names(out / "checkpoint-5") == CHECKPOINT_FILES


def test_a_finished_run_is_not_overwritten(train, basic, plain_run):
    before = (plain_run / "adapter_model.safetensors").read_bytes()
    run = train({**basic, "output_dir": str(plain_run)})
    assert run.returncode == 1
    assert "Traceback" not in run.stdout
    for fragment in ("output_dir", str(plain_run), "resume_from_checkpoint", "overwrite_output_dir"):
        assert fragment in run.stdout
    assert (plain_run / "adapter_model.safetensors").read_bytes() == before


def test_overwriting_starts_from_scratch(train, basic, plain_run, tmp_path):
    """No checkpoint or evaluation result of the old run is left."""
    out = tmp_path / "out"
    shutil.copytree(plain_run, out)
    changed = {"max_steps": 1, "save_steps": 100, "overwrite_output_dir": True, "output_dir": str(out)}
    finish(train({**basic, **changed}))
    assert record(out)["steps"] == 1
    assert losses(out) == pytest.approx({1: losses(plain_run)[1]}, abs=1e-6)
    assert names(out) - {"checkpoint-1"} == RUN_FILES
    assert "eval_loss" not in json.loads((out / "all_results.json").read_text())


def test_the_command_killed_and_resumed(long_basic, train, tmp_path):
    """`python train.py` itself, killed with its process group at an arbitrary step, and resumed."""
    values = {**long_basic, "max_steps": 60, "save_steps": 5, "save_total_limit": 2}
    finish(train({**values, "output_dir": str(tmp_path / "uninterrupted")}))
    out = tmp_path / "out"
    file = train.yaml({**values, "output_dir": str(out)})
    command = [sys.executable, "train.py", "--train_args_file", str(file), "--resume_from_checkpoint", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        while not (out / "checkpoint-10" / "longqlora.json").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (out / "longqlora.json").exists()
    finish(train({**values, "output_dir": str(out), "resume_from_checkpoint": "auto"}))
    assert len(losses(out)) == 60
    assert losses(out) == pytest.approx(losses(tmp_path / "uninterrupted"), abs=1e-6)


# ---- other launchers


def overflow_at_the_third_step() -> None:
    """Put an infinity in the last gradient before DeepSpeed checks for overflow in the third step."""
    import component.train.zero

    check, calls = component.train.zero.any_overflow, []

    def with_overflow(gradients):
        calls.append(len(calls))
        if len(calls) == 3:
            gradients[0][-1].view(-1)[-1] = torch.inf
        print("overflow", check(gradients).tolist())
        return check(gradients)

    component.train.zero.any_overflow = with_overflow


@pytest.mark.slow
def test_a_step_that_overflows_is_skipped(train, basic, tmp_path):
    """Under ZeRO-2 in bf16: three steps, the last of which overflows, equal two steps."""
    values = {**basic, "bf16": True, "eval_strategy": "no", **DEEPSPEED}
    printed = finish(train({**values, "max_steps": 3, "output_dir": f"{tmp_path}/three"}, overflow_at_the_third_step))
    finish(train({**values, "max_steps": 2, "output_dir": f"{tmp_path}/two"}))
    assert re.findall(r"overflow \[(\w+)\]", printed) == ["False", "False", "True"]
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("three", "two"))
    assert all(weight.equal(found[name]) for name, weight in expected.items())
    assert any(bool(weight.any()) for name, weight in expected.items() if "lora_B" in name)


DEEPSPEED = {"deepspeed": "./train_args/deepspeed/deepspeed_config_s2_no_offload.json"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "changed"),
    [
        (["deepspeed"], DEEPSPEED),
        ([sys.executable], DEEPSPEED),
        ([sys.executable], {}),
        (["torchrun", "--nproc_per_node=1"], {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
        (["torchrun", "--nproc_per_node=2"], {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
        (["torchrun", "--nproc_per_node=2"], {"per_device_train_batch_size": 2, **DEEPSPEED}),
    ],
    ids=["deepspeed", "python-zero2", "python", "torchrun-1", "torchrun-2", "torchrun-2-zero2"],
)
def test_launchers_agree(train, basic, files, plain_run, base_folder, tmp_path, launcher, changed):
    """Each step covers the same four texts, however they are distributed: the same losses and evaluation."""
    values = {**basic, **changed, "eval_file": files["eval_file"], "per_device_eval_batch_size": 2, "save_steps": 2}
    if not Path(launcher[0]).is_absolute():
        launcher = [executable(launcher[0]), *launcher[1:]]
    out = launched(launcher, {**values, "output_dir": str(tmp_path / "out")}, train)
    assert losses(out) == pytest.approx(losses(plain_run), abs=1e-5)
    assert logged(out, "grad_norm") == pytest.approx(logged(plain_run, "grad_norm"), rel=1e-4)  # Adam hides scales
    measured, expected = (json.loads((folder / "eval_results.json").read_text()) for folder in (out, plain_run))
    assert measured["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-4)
    assert measured["eval_loss"] == pytest.approx(reference_eval_loss(out, base_folder), abs=1e-5)
    assert record(out)["trained_tokens"] == record(plain_run)["trained_tokens"]
    assert record(out)["files"].keys() == record(plain_run)["files"].keys()
    assert not list(out.rglob("training_args.bin"))


@pytest.mark.slow
def test_deepspeed_resumes(train, long_basic, tmp_path):
    """ZeRO-2 has its own checkpoint inside ours."""
    values = {**long_basic, **DEEPSPEED, "max_steps": 4}
    reference = launched([sys.executable], {**values, "output_dir": str(tmp_path / "reference")}, train)
    out = tmp_path / "out"
    shutil.copytree(reference / "checkpoint-2", out / "checkpoint-2")
    launched([sys.executable], {**values, "output_dir": str(out), "resume_from_checkpoint": "auto"}, train)
    assert losses(out) == pytest.approx(losses(reference), abs=1e-6)
    assert len(losses(out)) == 4
