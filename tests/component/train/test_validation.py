"""Invalid values of the right type: alone, in combination, and on this machine."""

import math

import pytest
import torch
from transformers import TrainingArguments

from component.train.validation import validate

RIGHT = {"output_dir": "out", "max_seq_length": 8192, "model_max_length": 8192, "sft": False}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def card(monkeypatch):
    """card(7, 0): pretend to have a GPU of that compute capability."""

    def make(*capability: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Card")
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)

    return make


def test_valid_values():
    assert validate(RIGHT) == []


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("max_seq_length", [2, 8192], [1, 0, -1]),
        ("train_sampling_strategy", ["random", "group_by_length"], ["by_length", ""]),
        ("eval_delay", [0, 5], [-1]),
        ("ddp_timeout", [60], [0, -1]),
        ("ddp_backend", ["gloo", "nccl"], ["foo"]),
        ("debug", ["", "underflow_overflow"], ["tpu_metrics_debug", "foo"]),
        ("accelerator_config", [{}, {"even_batches": False}, "file.json"], [{"foo": 1}]),
        ("do_train", [True], [False]),
        ("include_num_input_tokens_seen", ["non_padding", "no", False], ["all", True]),
        ("greater_is_better", [False], [True]),
        ("eval_steps", [10, 0.5], [0, -5]),
        ("gradient_checkpointing_kwargs", [{}, {"use_reentrant": True}], [{"foo": True}]),
        ("metric_for_best_model", ["loss", "eval_loss", "perplexity"], ["rouge", "accuracy"]),
        ("group_size", [2, 2048], [0, 1, 2047, -2]),
        ("group_size_ratio", [0.001, 1], [0, 1.01, -0.25]),
        ("full_attention_ratio", [0, 0.1, 1], [-0.1, 1.1]),
        ("rope_type", ["linear", "dynamic", "yarn", "theta"], ["longrope", "default"]),
        ("rope_theta", [2, 5e5], [0, -5e5, 1, math.inf, math.nan, 1e17]),
        ("truncation_policy", ["truncate", "split", "drop"], ["pad"]),
        ("max_bad_fraction", [0, 0.99], [1, -0.01]),
        ("lora_rank", [1, 64], [0]),
        ("lora_alpha", [0.5, 16], [0, -1]),
        ("lora_dropout", [0, 0.05], [1, -0.1]),
        ("learning_rate", [2e-4], [0, 1, -1e-4]),
        ("max_steps", [-1, 1, 1000], [0, -2]),
        ("warmup_steps", [0, 20], [-1]),
        ("eval_accumulation_steps", [1, 4], [0, -1]),
        ("keep_layers", [0, 32], [-1]),
        ("loss_chunk_tokens", [1], [0]),
        ("seed", [0, 2**32 - 1], [-1, 2**32]),
        ("target_modules", ["q_proj", ["q_proj"]], ["", " , ", []]),
        ("report_to", ["none", ["none"]], ["nowhere", ["none", "nowhere"]]),
    ],
)
def test_bounds(key, right, wrong):
    for value in right:
        assert validate({**RIGHT, key: value}) == []
    for value in wrong:
        (problem,) = validate({**RIGHT, key: value})
        assert problem.startswith(f"{key}: {value!r}; use ")


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        (
            {"sequence_parallel_size": 2},
            "sequence_parallel_size",
            "2, but this run has 1 process; start a multiple of 2",
        ),
        ({"max_seq_length": 8193}, "max_seq_length", "8193 tokens exceed model_max_length, 8192"),
        ({"output_dir": ""}, "output_dir", "missing"),
        ({"output_dir": None}, "output_dir", "missing"),
        ({"eval_strategy": "steps"}, "eval_strategy", "no eval_file"),
        ({"do_eval": True}, "do_eval", "true, but there is no eval_file; add one"),
        ({"do_eval": False, "eval_file": "e.jsonl"}, "do_eval", "false, but there is an eval_file"),
        ({"eval_on_start": True}, "eval_on_start", "true, but there is no eval_file; add one"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor", "set memory_plan: false"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers", "dataloader_num_workers above 0"),
        ({"dataloader_multiprocessing_context": "spawn"}, "dataloader_multi", "dataloader_num_workers above 0"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor", "dataloader_num_workers above 0"),
        ({"fsdp_config": {"min_num_params": 1}}, "fsdp", "not supported"),
        (
            {"streaming": True, "max_steps": 9, "train_sampling_strategy": "group_by_length"},
            "train_sampling",
            "leave it",
        ),
        ({"sft": True, "truncation_policy": "split"}, "truncation_policy", "cannot be split"),
        ({"streaming": True}, "streaming", "set max_steps"),
        ({"streaming": True, "max_steps": -1}, "streaming", "set max_steps"),
        ({"streaming": True, "max_steps": 9, "save_strategy": "epoch"}, "save_strategy", "use steps"),
        ({"template": "tokenizer"}, "template", "only used with sft: true"),
        ({"memory_budget_gib": 32.0}, "memory_budget_gib", "32, but there is no GPU"),
        ({"fp16": True, "bf16": True}, "fp16, bf16", "keep one"),
        ({"fp16": True}, "fp16", "no GPU here"),
        ({"fp16": True, "use_cpu": True}, "fp16", "no GPU here"),
        ({"bf16": True}, "bf16", "no GPU here"),
        ({"use_flash_attn": True}, "use_flash_attn", "an Ampere or newer GPU"),
        ({"frozen_matmul": "fp4"}, "frozen_matmul", "'fp4'; use one of auto, unquantized, fp8_backward, fp8"),
        ({"frozen_matmul": "fp8", "memory_plan": False}, "frozen_matmul", "leave memory_plan out"),
    ],
)
def test_contradictions(changes, key, words):
    (problem,) = validate({**RIGHT, **changes})
    assert problem.startswith(key)
    assert words in problem


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_strategy": "steps", "eval_file": "e.jsonl"},
        {"sft": True, "template": "tokenizer", "truncation_policy": "drop"},
        {"streaming": True, "max_steps": 9, "save_strategy": "steps"},
        {"label_smoothing_factor": 0.1, "memory_plan": False},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2},
        {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "spawn"},
        {"bf16": True, "use_cpu": True},
        {"use_flash_attn": False},
        {"frozen_matmul": "fp8"},
        {"frozen_matmul": "auto", "memory_plan": False},
        {"frozen_matmul": "unquantized", "memory_plan": False},
    ],
)
def test_valid_combinations(changes):
    assert validate({**RIGHT, **changes}) == []


@pytest.mark.parametrize(
    ("capability", "changes", "words"),
    [
        ((7, 0), {"fp16": True}, None),
        ((7, 0), {"bf16": True}, "bf16: true, but Card has no bf16; set fp16: true"),
        ((7, 5), {"fp16": True, "use_flash_attn": True}, "use_flash_attn: true needs an Ampere or newer GPU"),
        ((8, 0), {"bf16": True, "use_flash_attn": True, "memory_budget_gib": 32.0}, None),
        ((8, 0), {"use_flash_attn": True}, "fp16: true or bf16: true, here is Card"),
        ((8, 0), {"fp16": True, "use_cpu": True}, "no GPU here"),
        ((8, 6), {"bf16": True, "frozen_matmul": "fp8"}, "fp8 needs an Ada, Hopper or Blackwell GPU"),
        ((8, 6), {"bf16": True, "frozen_matmul": "fp8"}, "here is Card (8.6); set it to auto"),
        ((8, 6), {"bf16": True, "use_cpu": True, "frozen_matmul": "fp8"}, None),
        ((8, 9), {"bf16": True, "frozen_matmul": "fp8"}, None),
        ((12, 0), {"bf16": True, "frozen_matmul": "fp8"}, None),
        ((9, 0), {"fp16": True, "frozen_matmul": "fp8"}, "set bf16: true, or frozen_matmul: auto"),
        ((8, 6), {"bf16": True, "frozen_matmul": "fp8_backward"}, "fp8_backward needs an Ada, Hopper or Blackwell"),
    ],
)
def test_gpu_capabilities(capability, changes, words, card):
    card(*capability)
    problems = validate({**RIGHT, **changes})
    assert (problems == []) if words is None else (len(problems) == 1 and words in problems[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sequence_parallel_size": 4, "max_seq_length": 3}, "max_seq_length is 3 tokens; use at most 3"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches, split_batches: not possible"),
        ({"label_smoothing_factor": 0.1, "memory_plan": False}, "label_smoothing_factor: not possible"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices: false: not possible"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance: not possible"),
    ],
)
def test_what_split_rows_do_not_allow(monkeypatch, changes, words):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert validate({**RIGHT, "sequence_parallel_size": 2}) == []
    (problem,) = validate({**RIGHT, "sequence_parallel_size": 2, **changes})
    assert words in problem


def test_all_problems_are_reported():
    assert torch.cuda.is_available() is False
    problems = validate({**RIGHT, "output_dir": "", "lora_rank": 0, "learning_rate": 2, "fp16": True})
    assert [problem.split(":")[0] for problem in problems] == ["lora_rank", "learning_rate", "output_dir", "fp16"]


def test_k21_numbers_beyond_any_size():
    problems = validate(RIGHT | {"max_seq_length": 10**400, "model_max_length": 10**400, "lora_rank": 2**53})
    cure = f"1{'0' * 19}...; use a number below 2**53"
    assert problems == [f"max_seq_length: {cure}", f"model_max_length: {cure}"]


def test_k13_a_stage_that_zero_does_not_have():
    wrong = {"deepspeed": {"zero_optimization": {"stage": 9}}}
    assert validate(RIGHT | wrong) == ["deepspeed: zero_optimization has stage 9; use 0, 1, 2 or 3"]
    assert validate(RIGHT | {"deepspeed": {"zero_optimization": {"stage": 3}}}) == []


WITHOUT_EFFECT = {
    "push_to_hub": True,
    "hub_model_id": "me/mine",
    "hub_strategy": "end",
    "label_names": ["labels"],
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "do_predict": True,
    "enable_jit_checkpoint": True,
    "length_column_name": "tokens",
    "liger_kernel_config": {"rope": True},
    "local_rank": 3,
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "use_cache": True,
}


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_keys_that_are_not_honoured(key, tmp_path):
    """They are refused; what transformers has by default changes nothing and passes."""
    (problem,) = validate(RIGHT | {key: WITHOUT_EFFECT[key]})
    assert problem.startswith(f"{key}: {WITHOUT_EFFECT[key]!r} is not supported; leave it out: ")
    assert validate(RIGHT | {key: getattr(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), key)}) == []


SKIPPING = RIGHT | {"model_max_length": 32768, "position_skipping": True}


def test_position_skipping():
    assert validate(SKIPPING) == []
    (problem,) = validate(SKIPPING | {"model_max_length": 8192})
    assert problem.startswith("position_skipping: true, but rows of 8192 tokens leave nothing to skip")
    (problem,) = validate(SKIPPING | {"packing": True})
    assert "packing: true" in problem
    assert "set one of them to false" in problem


GRAPH = RIGHT | {"cuda_graph": True, "lora_dropout": 0.0, "bf16": True}


def on_gpu(monkeypatch):
    for name, found in {"is_available": True, "get_device_name": "H100", "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, found=found: found)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_dropout": 0.05}, "lora_dropout draws random numbers"),
        ({"deepspeed": "./train_args/deepspeed/deepspeed_config_s2.json"}, "deepspeed is set"),
        ({"bf16": False, "fp16": True}, "fp16: true"),
        ({"packing": True}, "packing: true"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha draws random numbers"),
        ({"optim": "adalomo"}, "optim: adalomo updates weights"),
        ({"optim": "galore_adamw_layerwise"}, "optim: galore_adamw_layerwise updates weights"),
        ({"train_embedding": True}, "train_embedding: true"),
        ({"memory_plan": False}, "memory_plan: false"),
    ],
)
def test_what_a_cuda_graph_excludes(changes, reason, monkeypatch):
    on_gpu(monkeypatch)
    assert validate(GRAPH) == []
    assert validate(GRAPH | changes | {"cuda_graph": False}) == []
    (problem,) = validate(GRAPH | changes)
    assert problem.startswith(f"cuda_graph: true, but {reason}")


def test_a_cuda_graph_without_lora_dropout_given(monkeypatch):
    """The key's default is 0.05."""
    on_gpu(monkeypatch)
    (problem,) = validate({key: value for key, value in GRAPH.items() if key != "lora_dropout"})
    assert "lora_dropout" in problem


def test_a_cuda_graph_needs_one_gpu(monkeypatch):
    on_gpu(monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (problem,) = validate(GRAPH)
    assert "several processes" in problem
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert any(problem.startswith("cuda_graph: true, but there is no GPU") for problem in validate(GRAPH))
