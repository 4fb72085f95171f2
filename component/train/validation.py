"""Which values of a YAML are invalid, alone, in combination, or on this machine?"""

import os
from dataclasses import fields

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels

from component.data import TEMPLATES
from component.data.document import POLICIES
from component.float8.product import CAPABILITY
from component.rope import ROPE_TYPES, THETA
from component.train.argument import FLOAT8, MATMULS, LongQLoRAArguments
from component.train.zero import bad_strategy

SAMPLING = ("random", "sequential", "group_by_length", "batch_rebalance")  # transformers reads any other as random
LARGEST = 2**53
BACKENDS = ("nccl", "gloo", "mpi")
START_METHODS = ("fork", "spawn", "forkserver")
ACCELERATOR_OPTIONS = [item.name for item in fields(AcceleratorConfig)]
OF_WORKERS = ("dataloader_multiprocessing_context", "dataloader_persistent_workers", "dataloader_prefetch_factor")
CHECKPOINT_OPTIONS = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug")
# keys -> (predicate of a valid value, cure)
BOUNDS = {
    "max_seq_length model_max_length": (lambda v: v >= 2, "at least 2 tokens"),
    "group_size": (lambda v: v >= 2 and v % 2 == 0, "an even number of tokens >= 2"),
    "group_size_ratio": (lambda v: 0 < v <= 1, "a share in (0, 1], 0.25 in the paper"),
    "full_attention_ratio": (lambda v: 0 <= v <= 1, "a share of the steps in [0, 1], e.g. 0.1"),
    "rope_type": (lambda v: v in (*ROPE_TYPES, THETA), "one of " + ", ".join((*ROPE_TYPES, THETA))),
    "rope_theta": (lambda v: 1 < v <= LARGEST, "a number above the model's own, e.g. 500000"),
    "truncation_policy": (lambda v: v in POLICIES, "one of " + ", ".join(POLICIES)),
    "template": (lambda v: v in TEMPLATES, "one of " + ", ".join(TEMPLATES)),
    "frozen_matmul": (lambda v: v in MATMULS, "one of " + ", ".join(MATMULS)),
    "max_bad_fraction": (lambda v: 0 <= v < 1, "a share in [0, 1), e.g. 0.01"),
    "lora_rank gradient_accumulation_steps eval_accumulation_steps": (lambda v: v >= 1, "at least 1"),
    "sequence_parallel_size": (lambda v: v >= 1, "at least 1"),
    "per_device_train_batch_size per_device_eval_batch_size": (lambda v: v >= 1, "at least 1"),
    "lora_alpha memory_budget_gib num_train_epochs save_steps eval_steps logging_steps": (
        lambda v: v > 0,
        "a number above 0",
    ),
    "keep_layers keep_attention_layers mlp_tile_tokens": (lambda v: v >= 0, "0 or more"),
    "loss_chunk_tokens": (lambda v: v >= 1, "at least 1"),
    "lora_dropout": (lambda v: 0 <= v < 1, "a probability in [0, 1)"),
    "learning_rate": (lambda v: 0 < v < 1, "a number in (0, 1), e.g. 2e-4"),
    "max_steps": (lambda v: v >= 1 or v == -1, "at least 1, or -1 to train for num_train_epochs"),
    "warmup_steps weight_decay max_grad_norm dataloader_num_workers": (lambda v: v >= 0, "0 or more"),
    "target_modules": (lambda v: str(v).strip(", []"), "names of linear layers, or leave the key out for all of them"),
    "log_level log_level_replica": (lambda v: v in trainer_log_levels, "one of " + ", ".join(trainer_log_levels)),
    "train_sampling_strategy": (lambda v: v in SAMPLING, "one of " + ", ".join(SAMPLING)),
    "do_train": (lambda v: v, "true, or leave it out: train.py always trains"),
    "include_num_input_tokens_seen": (
        lambda v: v in ("non_padding", "no", False),
        "non_padding, or leave it out: trained tokens are counted without padding",
    ),
    "greater_is_better": (lambda v: not v, "false, or leave it out: a smaller loss or perplexity is better"),
    "gradient_checkpointing_kwargs activation_checkpointing_kwargs": (
        lambda v: set(v) <= set(CHECKPOINT_OPTIONS),
        "options of torch.utils.checkpoint: " + ", ".join(CHECKPOINT_OPTIONS),
    ),
    "metric_for_best_model": (
        lambda v: v.removeprefix("eval_") in ("loss", "perplexity"),
        "loss or perplexity, which evaluation computes",
    ),
    "label_smoothing_factor": (lambda v: 0 <= v < 1, "a share in [0, 1)"),
    "eval_delay": (lambda v: v >= 0, "0 or more"),
    "ddp_timeout": (lambda v: v > 0, "seconds above 0"),
    "ddp_backend": (lambda v: v in BACKENDS, "one of " + ", ".join(BACKENDS)),
    "dataloader_multiprocessing_context": (lambda v: v in START_METHODS, "one of " + ", ".join(START_METHODS)),
    "debug": (lambda v: v in ("", "underflow_overflow"), "underflow_overflow"),
    "accelerator_config": (
        lambda v: isinstance(v, str) or set(v) <= set(ACCELERATOR_OPTIONS),
        "options of transformers' AcceleratorConfig: " + ", ".join(ACCELERATOR_OPTIONS),
    ),
    "seed data_seed": (lambda v: 0 <= v < 2**32, "0 or more, below 2**32"),
    "report_to": (
        lambda v: all(
            name in ("none", "all", *get_available_reporting_integrations())
            for name in ([v] if isinstance(v, str) else v)
        ),
        "none, tensorboard, or a tracker that is installed",
    ),
}
_UPLOAD = "upload the finished adapter: hf upload OWNER/NAME OUTPUT_DIR"
_LABELS = "labels and their losses are made here, from the data"
# keys of transformers.TrainingArguments without effect here, or with a wrong one -> what to do; their defaults pass
NOT_HONOURED = {
    **dict.fromkeys(["push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_always_push"], _UPLOAD),
    **dict.fromkeys(["hub_private_repo", "hub_revision"], _UPLOAD),
    **dict.fromkeys(["label_names", "include_for_metrics"], _LABELS),
    "batch_eval_metrics": "perplexity is computed over the whole evaluation set",
    "do_predict": "use script/inference/inference.py",
    "enable_jit_checkpoint": "it saves in the middle of a step, and would resume with other losses; lower save_steps",
    "length_column_name": "lengths are those of the tokenized samples",
    "liger_kernel_config": "use_liger_kernel turns all of Liger's kernels on or off",
    "local_rank": "launchers tell it to each process",
    **dict.fromkeys(
        ["torch_compile", "torch_compile_backend", "torch_compile_mode"],
        "it is untested with 4-bit weights and memory plans",
    ),
    "use_cache": "only generation needs a cache",
}
DEFAULTS = {item.name: item.default for item in fields(TrainingArguments)}


def not_honoured(values: dict) -> list[str]:
    """One message for each key that does not do here what transformers says."""
    return [
        f"{key}: {values[key]!r} is not supported; leave it out: {why}"
        for key, why in NOT_HONOURED.items()
        if values.get(key) and values[key] != DEFAULTS[key]
    ]


def out_of_bounds(values: dict) -> list[str]:
    """One message for each value, of the right type, that is impossible by itself."""
    problems = [
        f"{key}: {values[key]!r}; use {cure}"
        for keys, (is_valid, cure) in BOUNDS.items()
        for key in keys.split()
        if values.get(key) is not None and not is_valid(values[key])
    ]
    # torch's sizes have 64 bits, and estimates multiply them as floats
    too_large = [key for key, value in values.items() if isinstance(value, int) and abs(value) > LARGEST]
    return problems + [f"{key}: {str(values[key])[:20]}...; use a number below 2**53" for key in too_large]


def cure_of(key: str) -> str:
    """What a value of `key` may be; empty if any of its type."""
    return next((cure for keys, (_, cure) in BOUNDS.items() if key in keys.split()), "")


def validate(values: dict) -> list[str]:
    """One message for each invalid value, or combination of values, of the right type."""
    problems = out_of_bounds(values) + not_honoured(values)
    longest, target = values.get("max_seq_length"), values.get("model_max_length")
    if longest and target and longest > target:
        cure = "raise model_max_length or shorten the samples"
        problems.append(f"max_seq_length: {longest} tokens exceed model_max_length, {target}; {cure}")
    if values.get("position_skipping") and longest and longest == target:
        cure = "raise model_max_length, or leave position_skipping out"
        problems.append(f"position_skipping: true, but rows of {longest} tokens leave nothing to skip; {cure}")
    if values.get("position_skipping") and values.get("packing"):
        problems.append(
            "position_skipping: true, but packing: true fills rows with short samples, which end long before "
            "model_max_length; set one of them to false"
        )
    if not values.get("output_dir"):
        problems.append("output_dir: missing; the folder where checkpoints and the adapter are saved")
    is_best = values.get("save_strategy") == "best" or values.get("load_best_model_at_end")
    if is_best and values.get("eval_strategy", "no") == "no":
        problems.append("save_strategy: best, load_best_model_at_end: nothing is evaluated; set eval_strategy")
    if values.get("eval_strategy", "no") != "no" and not values.get("eval_file"):
        problems.append(f"eval_strategy: {values['eval_strategy']}, but there is no eval_file; add one")
    for key in ("do_eval", "eval_on_start"):
        if values.get(key) and not values.get("eval_file"):
            problems.append(f"{key}: true, but there is no eval_file; add one")
    if values.get("do_eval") is False and values.get("eval_file"):
        problems.append("do_eval: false, but there is an eval_file, which is evaluated; leave it out")
    if values.get("label_smoothing_factor") and values.get("memory_plan", True):
        problems.append("label_smoothing_factor: a memory plan's loss has no smoothing; set memory_plan: false, or 0")
    if not values.get("dataloader_num_workers"):
        cure = "only used with dataloader_num_workers above 0; set it, or leave this out"
        problems += [f"{key}: {values[key]}, {cure}" for key in OF_WORKERS if values.get(key)]
    if values.get("sft") and values.get("truncation_policy") == "split":
        problems.append("truncation_policy: split, but a chat (sft: true) cannot be split; use truncate or drop")
    if values.get("streaming") and (values.get("max_steps") or -1) < 1:
        problems.append("streaming: true, but a stream has no known length; set max_steps")
    if values.get("streaming") and "epoch" in (values.get("save_strategy"), values.get("eval_strategy")):
        problems.append("save_strategy, eval_strategy: epoch, but a stream has no epochs; use steps")
    sampling = values.get("train_sampling_strategy", "random")
    if values.get("streaming") and sampling != "random":
        problems.append(f"train_sampling_strategy: {sampling}, but a stream is shuffled in a buffer; leave it out")
    if values.get("template", "vicuna") != "vicuna" and values.get("sft") is False:
        problems.append("template: only used with sft: true; leave it out")
    problems += _impossible_split(values)
    if (values.get("memory_budget_gib") or 0) > 0 and not torch.cuda.is_available():
        problems.append(f"memory_budget_gib: {values['memory_budget_gib']:g}, but there is no GPU; leave it out")
    problems += _impossible_precision(values) + _impossible_float8(values) + _impossible_graph(values)
    return problems + bad_strategy(values)


def _impossible_split(values: dict) -> list[str]:
    """Problems with rows that are split over processes."""
    parts = values.get("sequence_parallel_size") or 1
    if parts <= 1:
        return []
    problems, processes = [], int(os.environ.get("WORLD_SIZE", "1"))
    if processes % parts:
        cure = f"start a multiple of {parts}, e.g. deepspeed --num_gpus {parts} train.py, or change the key"
        word = "processes" if processes > 1 else "process"
        problems.append(f"sequence_parallel_size: {parts}, but this run has {processes} {word}; {cure}")
    if (values.get("max_seq_length") or parts) < parts:
        rows = values["max_seq_length"]
        problems.append(f"sequence_parallel_size: {parts}, but max_seq_length is {rows} tokens; use at most {rows}")
    config = values.get("accelerator_config")
    wrong = {
        "train_sampling_strategy: batch_rebalance": values.get("train_sampling_strategy") == "batch_rebalance",
        "accelerator_config: dispatch_batches, split_batches": isinstance(config, dict)
        and bool(config.get("dispatch_batches") or config.get("split_batches")),
        "label_smoothing_factor": bool(values.get("label_smoothing_factor")),
        "average_tokens_across_devices: false": values.get("average_tokens_across_devices") is False,
    }
    cure = "not possible if rows are split over processes; leave it out, or set sequence_parallel_size: 1"
    return problems + [f"{key}: {cure}" for key, is_set in wrong.items() if is_set]


def _impossible_precision(values: dict) -> list[str]:
    fp16, bf16 = values.get("fp16"), values.get("bf16")
    if fp16 and bf16:
        return ["fp16, bf16: both are true; keep one"]
    on_gpu = torch.cuda.is_available() and not values.get("use_cpu")
    if not on_gpu and (fp16 or (bf16 and not values.get("use_cpu"))):
        cure = "leave it out (fp32), or set bf16: true and use_cpu: true"
        return [f"{'fp16' if fp16 else 'bf16'}: true, but there is no GPU here; {cure}"]
    name = torch.cuda.get_device_name() if on_gpu else "no GPU"
    is_old = on_gpu and torch.cuda.get_device_capability() < (8, 0)  # V100, Turing
    if bf16 and is_old:
        return [f"bf16: true, but {name} has no bf16; set fp16: true (README.md, 'Install')"]
    if values.get("use_flash_attn") and (is_old or not on_gpu or not (fp16 or bf16)):
        need = "an Ampere or newer GPU and fp16: true or bf16: true"
        return [f"use_flash_attn: true needs {need}, here is {name}; leave it out for the fastest available kernel"]
    return []


def _impossible_graph(values: dict) -> list[str]:
    if not values.get("cuda_graph"):
        return []
    optim = str(getattr(values.get("optim"), "value", values.get("optim")))
    wrong = {
        "there is no GPU": not torch.cuda.is_available() or values.get("use_cpu"),
        "several processes train": int(os.environ.get("WORLD_SIZE", "1")) > 1,
        "deepspeed is set, which handles each gradient in Python": values.get("deepspeed"),
        "fp16: true scales losses anew in each step": values.get("fp16"),
        "memory_plan: false leaves the layers to Hugging Face": values.get("memory_plan") is False,
        "lora_dropout draws random numbers": values.get("lora_dropout", LongQLoRAArguments.lora_dropout),
        f"optim: {optim} updates weights in the backward pass": "lomo" in optim or "layerwise" in optim,
        "packing: true fills each row in another way": values.get("packing"),
        "neftune_noise_alpha draws random numbers": values.get("neftune_noise_alpha"),
        "train_embedding: true waits for the GPU in each backward pass": values.get("train_embedding"),
    }
    cure = "set it to false, or change that"
    return [f"cuda_graph: true, but {reason}; {cure}" for reason, found in wrong.items() if found]


def _impossible_float8(values: dict) -> list[str]:
    """Without a GPU, FP8 is allowed: its numbers are multiplied in fp32, to try what it costs in quality."""
    kind = values.get("frozen_matmul")
    if kind not in FLOAT8:
        return []
    if values.get("memory_plan") is False:
        cure = "set it to auto, or leave memory_plan out"
        return [f"frozen_matmul: {kind}, but with memory_plan: false Hugging Face's layers multiply; {cure}"]
    if not torch.cuda.is_available() or values.get("use_cpu"):
        return []
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        need = "an Ada, Hopper or Blackwell GPU (compute capability 8.9 or newer)"
        return [
            f"frozen_matmul: {kind} needs {need}, here is {name} ({capability[0]}.{capability[1]}); set it to auto"
        ]
    if not values.get("bf16"):
        return [f"frozen_matmul: {kind}, but its products are rounded to bf16; set bf16: true, or frozen_matmul: auto"]
    return []
