"""What does a run print before its first step?"""

import math
from collections.abc import Sized

import torch
from torch import nn
from transformers import PretrainedConfig, TrainingArguments

from component.adapter import trainable_counts
from component.attention.kernel import describe_kernels
from component.memory.cost import checkpoint_bytes, describe_time
from component.memory.plan import MemoryPlan
from component.memory.rate import measured_rate
from component.memory.workload import Workload
from component.model import compute_dtype
from component.rope import scaling, scaling_warnings
from component.train.argument import LongQLoRAArguments
from component.train.trainer import LongQLoRATrainer
from component.train.zero import describe_optimizer


def print_summary(
    args: LongQLoRAArguments,
    training_args: TrainingArguments,
    trainer: LongQLoRATrainer,
    base: PretrainedConfig,
    more: dict[str, str],
) -> None:
    """Print the summary on the first process; `base`: the config before extension; `more`: lines, name -> text."""
    if trainer.is_world_process_zero():
        lines = summary_lines(args, training_args, trainer, base) | more
        print(f"\n{aligned(lines)}\n", flush=True)


def aligned(lines: dict[str, str]) -> str:
    width = max(len(name) for name in lines)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in lines.items())


def describe_trainable(model: nn.Module) -> str:
    counts = trainable_counts(model)
    parts = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    return f"{sum(counts.values()):,} parameters ({parts})"


def describe_context(args: LongQLoRAArguments, base: PretrainedConfig, extended: PretrainedConfig) -> dict[str, str]:
    """The lines about the scaling of positions: old -> new, and what may not be as asked."""
    old, new, target = scaling(base), scaling(extended), args.model_max_length
    lines = {"context": f"{old.context} -> {target} tokens ({old} -> {new})"}
    thetas = [config.rope_parameters["rope_theta"] for config in (base, extended)]
    if thetas[0] != thetas[1]:
        lines["rope_theta"] = "{:g} -> {:g}".format(*thetas)
    if args.position_skipping:
        cover = f"rows of up to {args.max_seq_length} tokens cover {target} positions"
        lines["positions"] = f"{cover}: two chunks, a random skip between them (PoSE); none in evaluation"
    warnings = scaling_warnings(base, extended, target, args.rope_type, args.rope_theta)
    return lines | ({"warning": "; ".join(warnings)} if warnings else {})


def describe_base(args: LongQLoRAArguments, training_args: TrainingArguments, dtype: torch.dtype) -> str:
    line = f"{'NF4, double quantization' if args.load_in_4bit else dtype}, compute dtype {dtype}"
    if args.in_float8:
        place = ", simulated in fp32" if training_args.device.type != "cuda" else ""
        which = "products with frozen weights" if args.float8_forward else "gradients of activations"
        line += f", {which} in FP8 (e4m3{place})"
    return line


def describe_attention(args: LongQLoRAArguments) -> str:
    if not args.use_shift_short_attention:
        return "full" + (" in every step; full_attention_ratio has no effect" if args.full_attention_ratio else "")
    last = f"in the last {100 * args.full_attention_ratio:g} % of the steps and " if args.full_attention_ratio else ""
    return f"S2-Attn with groups of {args.group_tokens} tokens; full attention {last}in evaluation"


def describe_cost(
    args: LongQLoRAArguments,
    training_args: TrainingArguments,
    trainer: LongQLoRATrainer,
    work: Workload,
    plan: MemoryPlan | None,
    done: int = 0,
) -> tuple[dict[str, str], dict[str, float]]:
    """The lines about expected time, where it can be known, and disk; without a `plan`, only disk.

    Args:
        done: steps of the checkpoint that is resumed.

    Returns:
        The lines, and the expected times in numbers by name.
    """
    steps, lines, expected = total_steps(training_args, trainer), {}, dict[str, float]()
    dtype = compute_dtype(training_args.fp16, training_args.bf16)
    rate = measured_rate(work, training_args.device, dtype) if plan else None
    if plan and rate:
        text, expected = describe_time(
            work,
            plan,
            rate,
            steps=steps,
            micro_batches=training_args.gradient_accumulation_steps,
            is_full=not args.use_shift_short_attention,
            full_ratio=args.full_attention_ratio,
            cuda_graph=args.cuda_graph,
            done=done,
        )
        lines["time"] = f"expected from this GPU's rate: {text}"
    count = checkpoint_count(training_args, steps, steps_per_epoch(training_args, trainer))
    if count:
        each = checkpoint_bytes(work, only_model=training_args.save_only_model) / 2**30
        several = f": {count} checkpoints of {each:.2g} GiB at the same time" if count > 1 else ": one checkpoint"
        lines["disk"] = f"up to {count * each:.3g} GiB{several}"
    return lines, expected


def total_steps(training_args: TrainingArguments, trainer: LongQLoRATrainer) -> int:
    """Optimizer steps of the run."""
    if training_args.max_steps > 0:
        return training_args.max_steps
    return math.ceil(training_args.num_train_epochs * (steps_per_epoch(training_args, trainer) or 1))


def steps_per_epoch(training_args: TrainingArguments, trainer: LongQLoRATrainer) -> int | None:
    """As the Trainer counts them: the last one may have fewer micro-batches. None for a stream, without epochs."""
    if not isinstance(trainer.train_dataset, Sized):
        return None
    samples = trainer.get_total_train_batch_size(training_args)
    rows, accumulated = len(trainer.train_dataset), training_args.gradient_accumulation_steps
    if training_args.dataloader_drop_last:  # incomplete micro-batches, before they are accumulated
        rows -= rows % (samples // accumulated)
    return max(1, math.ceil(rows / samples))


def checkpoint_count(training_args: TrainingArguments, steps: int, epoch_steps: int | None) -> int:
    """How many checkpoints exist at the same time: a new one is written before the oldest is removed.

    Args:
        steps: of the run.
        epoch_steps: of an epoch; None for a stream.
    """
    strategy, limit = training_args.save_strategy.value, training_args.save_total_limit
    every = {"steps": training_args.save_steps, "best": training_args.eval_steps or training_args.save_steps}
    if strategy == "no":
        return 0
    per_epoch = strategy == "epoch" or (strategy == "best" and training_args.eval_strategy.value == "epoch")
    interval = epoch_steps or steps if per_epoch else every[strategy]
    written = math.ceil(steps / (interval if interval >= 1 else interval * steps))  # the last step's too
    # beside the newest ones and the one being written, the best one so far stays
    keeps_best = strategy == "best" or training_args.load_best_model_at_end
    return min(written, limit + (2 if keeps_best and limit == 1 else 1)) if limit else written


def summary_lines(
    args: LongQLoRAArguments, training_args: TrainingArguments, trainer: LongQLoRATrainer, base: PretrainedConfig
) -> dict[str, str]:
    dtype = compute_dtype(training_args.fp16, training_args.bf16)
    rows = trainer.get_total_train_batch_size(training_args)
    optimizer = describe_optimizer(training_args.optim.value, training_args.deepspeed, training_args.max_grad_norm)
    return {
        "model": args.model_name_or_path,
        **describe_context(args, base, trainer.extended_config),
        "attention": describe_attention(args),
        "kernel": describe_kernels(training_args.device, dtype),
        "base": describe_base(args, training_args, dtype),
        "trainable": describe_trainable(trainer.model),
        "weights": f"{trainer.model.get_memory_footprint() / 2**30:.2f} GiB on {training_args.device}",
        "optimizer": optimizer,
        "step": f"{rows} samples, at most {rows * args.max_seq_length:,} tokens"
        + (", launched as one CUDA graph where no row is padded" if args.cuda_graph else ""),
        "output": training_args.output_dir,
    }
