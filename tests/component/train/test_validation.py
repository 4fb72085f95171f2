"""Invalid values of the right type: alone, in combination, and on this machine."""

import pytest
import torch

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
        ("batch_eval_metrics", [False], [True]),
        ("do_predict", [False], [True]),
        ("liger_kernel_config", [{}], [{"rope": True}]),
        ("gradient_checkpointing_kwargs", [{}, {"use_reentrant": True}], [{"foo": True}]),
        ("metric_for_best_model", ["loss", "eval_loss", "perplexity"], ["rouge", "accuracy"]),
        ("group_size", [2, 2048], [0, 1, 2047, -2]),
        ("group_size_ratio", [0.001, 1], [0, 1.01, -0.25]),
        ("full_attention_ratio", [0, 0.1, 1], [-0.1, 1.1]),
        ("rope_type", ["linear", "dynamic", "yarn"], ["longrope"]),
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
        ({"max_seq_length": 8193}, "max_seq_length", "8193 tokens exceed model_max_length, 8192"),
        ({"output_dir": ""}, "output_dir", "missing"),
        ({"output_dir": None}, "output_dir", "missing"),
        ({"eval_strategy": "steps"}, "eval_strategy", "no eval_file"),
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
        {"bf16": True, "use_cpu": True},
        {"use_flash_attn": False},
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
    ],
)
def test_gpu_capabilities(capability, changes, words, card):
    card(*capability)
    problems = validate({**RIGHT, **changes})
    assert (problems == []) if words is None else (len(problems) == 1 and words in problems[0])


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
