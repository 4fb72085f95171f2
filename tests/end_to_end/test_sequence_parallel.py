"""Training with rows split over processes, against one process with the same YAML.

SGD, so that the weights after a step are those before plus a multiple of their gradients: Adam would hide their scale
and amplify the rounding of those near zero.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.conftest import ROOT, build_llama
from tests.train_run import BASIC, TRAIN_TEXTS, Launcher, executable, finish, launched, logged, record
from tests.web_server import free_port

TEXTS = [f"{text} {number}" for number in range(2) for text in TRAIN_TEXTS]
UNCLIPPED = 1e6  # logs the norm of gradients and leaves them alone


@pytest.fixture(scope="module")
def base_with(tmp_path_factory, llama_config, base_folder):
    """base_with(heads, kv_heads): a base model with those, of 8 numbers each."""

    def build(heads: int, kv_heads: int) -> Path:
        folder = tmp_path_factory.mktemp("base") / f"{heads}-{kv_heads}"
        config = copy.deepcopy(llama_config)
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = heads, kv_heads, 8
        config.hidden_size = 8 * heads
        build_llama(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="module")
def basic(base_with, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {
        **BASIC,
        "model_name_or_path": str(base_with(4, 2)),
        "train_file": str(file),
        "eval_file": str(file),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_grad_norm": UNCLIPPED,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2,
    }


def assert_same_run(split: Path, whole: Path, tolerance: float = 1e-5) -> None:
    for name in ("loss", "grad_norm", "eval_loss"):
        assert logged(split, name) == pytest.approx(logged(whole, name), rel=tolerance), name
    assert record(split)["trained_tokens"] == record(whole)["trained_tokens"]
    for step in (1, 2, 3):
        file = f"checkpoint-{step}/adapter_model.safetensors"
        mine, theirs = load_file(split / file), load_file(whole / file)
        assert mine.keys() == theirs.keys()
        for name, expected in theirs.items():
            error = (mine[name] - expected).norm() / expected.norm().clamp(min=1e-6)
            assert error < tolerance, (step, name, error)


def compare(train: Launcher, values: dict, folder: Path, processes: int, **changes) -> None:
    """One process with `values`, and `processes` with `changes` on top."""
    runs = [("whole", 1, {}), ("split", processes, {"sequence_parallel_size": processes, **changes})]
    for name, count, more in runs:
        finish(train({**values, **more, "output_dir": str(folder / name)}, processes=count))
    assert_same_run(folder / "split", folder / "whole")


CASES = {
    # rows of 150 tokens: with 2 processes 75 each, with 3 50, with 4 38 and two padded
    "groups smaller than a part": (2, {"group_size": 24}),
    "a group as long as a part": (3, {"group_size": 50}),
    "a group of twice a part": (4, {"group_size": 76}),
    "a group of three times a part": (4, {"group_size": 114}),
    "full attention by heads": (2, {"use_shift_short_attention": False}),
    "full attention from the left": (3, {"use_shift_short_attention": False}),  # 4 heads
    "the last step with full attention": (4, {"full_attention_ratio": 0.34}),
    "packed": (3, {"packing": True, "gradient_accumulation_steps": 1}),
    "packed, full attention": (2, {"packing": True, "use_shift_short_attention": False}),
    "recomputed": (2, {"keep_layers": 0, "keep_attention_layers": 0, "keep_attention_output": False}),
    "recomputed, output kept and offloaded": (
        2,
        {"keep_layers": 0, "keep_attention_layers": 0, "keep_attention_output": True, "offload_activations": True},
    ),
    "MLP recomputed in tiles": (2, {"keep_layers": 1, "keep_attention_layers": 1, "mlp_tile_tokens": 13}),
    "Hugging Face's layers": (2, {"memory_plan": False, "gradient_checkpointing": True}),
    "embeddings and norms": (2, {"train_embedding": True, "train_norm": True}),
    "4-bit base": (2, {"load_in_4bit": True}),
    "streamed": (2, {"streaming": True}),
    "skipped positions": (3, {"position_skipping": True}),
    "skipped positions, full attention by heads": (2, {"position_skipping": True, "use_shift_short_attention": False}),
}
FAST = {
    "skipped positions",
    "groups smaller than a part",
    "a group of twice a part",
    "full attention by heads",
    "packed",
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES]
)
def test_split_rows_equal_whole_rows(train, basic, tmp_path, case):
    processes, changes = CASES[case]
    compare(train, {**basic, **changes}, tmp_path, processes)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (9, 3)])
@pytest.mark.parametrize("is_full", [False, True])
def test_grouped_queries(train, basic, base_with, tmp_path, heads, kv_heads, is_full):
    values = {**basic, "model_name_or_path": str(base_with(heads, kv_heads))}
    compare(train, {**values, "use_shift_short_attention": not is_full}, tmp_path, 3 if heads == 9 else 4)


@pytest.mark.parametrize("parts", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_with_data_parallelism(train, basic, tmp_path, parts):
    """4 processes, 2 or 4 of which read other rows, against accumulation over as many micro-batches."""
    data_parallel = 4 // parts
    values = {**basic, "per_device_train_batch_size": 1}
    more = {"gradient_accumulation_steps": 4 // data_parallel, "sequence_parallel_size": parts}
    runs = [("whole", 1, {"gradient_accumulation_steps": 4}), ("split", 4, more)]
    for name, processes, changes in runs:
        finish(train({**values, **changes, "output_dir": str(tmp_path / name)}, processes=processes))
    assert_same_run(tmp_path / "split", tmp_path / "whole")


def test_resumes(train, basic, tmp_path):
    values = {**basic, "sequence_parallel_size": 2, "lora_dropout": 0.1, "max_steps": 3}
    finish(train({**values, "output_dir": str(tmp_path / "unbroken")}, processes=2))
    (tmp_path / "broken").mkdir()
    (tmp_path / "unbroken/checkpoint-1").rename(tmp_path / "broken/checkpoint-1")
    resumed = {**values, "output_dir": str(tmp_path / "broken"), "resume_from_checkpoint": "auto"}
    finish(train(resumed, processes=2))
    assert logged(tmp_path / "broken", "loss") == logged(tmp_path / "unbroken", "loss")
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("broken", "unbroken"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"sequence_parallel_size": 3},
            "sequence_parallel_size: 3, but this run has 2 processes; start a multiple of 3",
        ),
        ({"sequence_parallel_size": 0}, "sequence_parallel_size: 0; use at least 1"),
        ({"rope_type": "dynamic"}, "dynamic positions are scaled by the length of a row"),
        (
            {"train_sampling_strategy": "batch_rebalance"},
            "train_sampling_strategy: batch_rebalance: not possible if rows are split",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(train, basic, tmp_path, changes, expected):
    run = train({**basic, "sequence_parallel_size": 2, **changes, "output_dir": str(tmp_path / "out")}, processes=2)
    assert run.returncode == 1
    assert expected in run.stdout
    assert "Traceback" not in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "deepspeed_config_s2_no_offload.json", "deepspeed_config_s3.json", "zero1"])
def test_launchers(train, basic, tmp_path, config):
    """torchrun and DeepSpeed, ZeRO-1 to 3; Adam as in the YAMLs, so losses and norms alone are compared."""
    values = {**basic, "optim": "adamw_torch", "learning_rate": 1e-3, "sequence_parallel_size": 2}
    if config == "zero1":
        content = json.loads((ROOT / "train_args/deepspeed/deepspeed_config_s2_no_offload.json").read_text())
        content["zero_optimization"]["stage"] = 1
        (tmp_path / "zero1.json").write_text(json.dumps(content))
        values["deepspeed"] = str(tmp_path / "zero1.json")
    elif config:
        values["deepspeed"] = f"./train_args/deepspeed/{config}"
    whole = {**values, "sequence_parallel_size": 1, "deepspeed": None, "output_dir": str(tmp_path / "whole")}
    finish(train(whole))
    split = {**values, "output_dir": str(tmp_path / "split")}
    launched([executable("torchrun"), "--nproc_per_node=2"], split, train)
    for name in ("loss", "grad_norm", "eval_loss"):
        found, expected = (logged(tmp_path / run, name) for run in ("split", "whole"))
        assert found == pytest.approx(expected, rel=1e-5), name


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory, llama_config, base_folder) -> Path:
    """Two layers of a 7B."""
    folder = tmp_path_factory.mktemp("wide")
    config = copy.deepcopy(llama_config)
    config.initializer_range = 0.02  # a wide model needs small weights: with large ones, losses are those of noise
    config.hidden_size, config.intermediate_size, config.head_dim = 4096, 11008, 128
    config.num_attention_heads = config.num_key_value_heads = 32
    build_llama(config).half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    return folder


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        {"bf16": True, "use_shift_short_attention": False},
        {"fp16": True, "use_flash_attn": False, "use_liger_kernel": False},  # the kernel of a V100
    ],
    ids=["bf16", "full", "memory-efficient"],
)
def test_on_two_gpus(wide_base, tmp_path, changes):
    """The losses and gradient norms of one GPU, within a few roundings of the half precision."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": " ".join(TEXTS * 8)[i:]}) + "\n" for i in range(8)))
    values = {
        **{name: value for name, value in BASIC.items() if name != "use_cpu"}, **changes, "load_in_4bit": True,
        "model_name_or_path": str(wide_base), "train_file": str(file), "max_seq_length": 1000, "group_size": 256,
        "model_max_length": 1024, "max_steps": 5, "learning_rate": 1e-4, "save_strategy": "no",
        "per_device_train_batch_size": 1, "deepspeed": "./train_args/deepspeed/deepspeed_config_s2_no_offload.json",
    }  # fmt: skip
    for cards in (1, 2):
        more = {"sequence_parallel_size": cards, "output_dir": str(tmp_path / str(cards))}
        (tmp_path / f"{cards}.yaml").write_text(yaml.safe_dump({**values, **more}))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(cards)]
        launcher += ["--master_port", str(free_port())]
        file = tmp_path / f"{cards}.yaml"
        subprocess.run([*launcher, "train.py", "--train_args_file", str(file)], cwd=ROOT, check=True)
    for name, tolerance in (("loss", 2e-3), ("grad_norm", 2e-2)):
        found, expected = (logged(tmp_path / cards, name) for cards in ("2", "1"))
        print(name, found, expected)
        assert found == pytest.approx(expected, rel=tolerance), name
