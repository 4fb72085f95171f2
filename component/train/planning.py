"""Which memory plan does a run train with, and how are frozen weights multiplied? Decided before weights load."""

from dataclasses import replace
from typing import NamedTuple

from transformers import PretrainedConfig, TrainingArguments

from component.attention.interface import has_plain_attention
from component.distributed.strategy import Strategy
from component.distributed.world import gathered
from component.memory.apply import liger_runs
from component.memory.budget import available_memory
from component.memory.plan import MEMORY_OPTIONS, Estimate, MemoryPlan, choose_plan, describe_estimate
from component.memory.workload import Workload, workload
from component.model import compute_dtype
from component.train.argument import LongQLoRAArguments
from component.train.model_check import chosen_matmul


class Memory(NamedTuple):
    """The chosen memory plan, the workload it was chosen for, and its estimate."""

    work: Workload
    plan: MemoryPlan
    expected: Estimate
    line: str  # for the summary
    fits: bool


def plan_memory(
    args: LongQLoRAArguments,
    training_args: TrainingArguments,
    strategy: Strategy,
    extended: PretrainedConfig,
    recorded: str | None,
) -> tuple[LongQLoRAArguments, Memory]:
    """The arguments with `frozen_matmul` decided, and the memory plan: unquantized if products in FP8 do not fit.

    Args:
        recorded: `frozen_matmul` of the checkpoint that the run resumes.
    """
    found = gathered([chosen_matmul(args, extended, training_args.device, training_args.bf16, recorded)])
    matmul = "unquantized" if "unquantized" in found else found[0]  # of processes whose GPUs differ
    chosen = replace(args, frozen_matmul=matmul)
    memory = fastest_plan(chosen, training_args, strategy, extended)
    if args.frozen_matmul == "auto" and chosen.in_float8 and not memory.fits:
        chosen = replace(args, frozen_matmul="unquantized")
        memory = fastest_plan(chosen, training_args, strategy, extended)
    return chosen, memory


def fastest_plan(
    args: LongQLoRAArguments, training_args: TrainingArguments, strategy: Strategy, extended: PretrainedConfig
) -> Memory:
    """The fastest memory plan that fits this machine, computed from the config alone."""
    eval_rows = training_args.eval_batch_size if args.eval_file else 0
    work = workload(
        extended,
        target_names=args.target_names,
        rank=args.lora_rank,
        train_embedding=args.train_embedding,
        train_norm=args.train_norm,
        tokens=training_args.per_device_train_batch_size * -(-args.max_seq_length // strategy.sequence_processes),
        group=args.group_tokens or args.max_seq_length,
        value_bytes=compute_dtype(training_args.fp16, training_args.bf16).itemsize,
        in_4bit=args.load_in_4bit,
        in_float8=args.in_float8,
        float8_forward=args.float8_forward,
        fused=liger_runs() if args.use_liger_kernel is None else args.use_liger_kernel,
        optimizer=training_args.optim.value,
        zero=strategy.zero_stage is not None,
        offload_optimizer=strategy.offloads_optimizer,
        processes=strategy.processes,
        sequence_processes=strategy.sequence_processes,
        shards=strategy.shards,
        rows=training_args.per_device_train_batch_size,
        full_steps=not args.use_shift_short_attention or args.full_attention_ratio > 0,
        eval_rows=eval_rows,
        eval_tokens=eval_rows * -(-args.max_seq_length // strategy.sequence_processes),
    )
    gpu_gib, host_gib = available_memory(work, args.memory_budget_gib, training_args.device)
    options = {name: getattr(args, name) for name in MEMORY_OPTIONS}
    if not uses_own_attention(args, extended):
        options["keep_attention_output"] = False
    plan, expected = choose_plan(work, gpu_gib, host_gib, **options)
    line = describe_estimate(work, plan, expected, gpu_gib)
    return Memory(work, plan, expected, line, expected.peak_gib <= gpu_gib)


def uses_own_attention(args: LongQLoRAArguments, extended: PretrainedConfig) -> bool:
    """Whether training runs component/attention instead of Hugging Face's full attention."""
    # position_skipping: transformers may take a skip for the border of a packed document
    if args.use_shift_short_attention or args.packing or args.sequence_parallel_size > 1 or args.position_skipping:
        return True
    # full attention by our kernels, so that a memory plan can keep attention's output
    return args.memory_plan and has_plain_attention(extended, args.max_seq_length)
