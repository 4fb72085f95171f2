"""Extend the context of a Llama-family model with LongQLoRA: YAML in, adapter folder out.

    deepspeed train.py --train_args_file ./train_args/llama2-7b-pretrain.yaml
    deepspeed train.py --train_args_file ./train_args/vicuna-13b-sft.yaml --learning_rate 5e-5

The same with `python` or `torchrun` in place of `deepspeed`. Any key of the YAML can be overridden as --key value.
"""

import copy
import sys

from transformers import PretrainedConfig, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from component.adapter import add_adapter, check_targets_early
from component.attention.interface import has_plain_attention, use_shift_short_attention
from component.attention.shift_short import limit_kernels
from component.checkpoint import prepare_output_dir
from component.cli import exit_on_user_error
from component.data.collator import RightPadCollator
from component.data.dataset import load_samples
from component.memory.apply import liger_runs, use_memory_plan
from component.memory.budget import available_memory, explaining_out_of_memory, limit_memory, peak_memory
from component.memory.plan import choose_plan, describe_estimate
from component.memory.workload import workload
from component.model import compute_dtype, load_base, load_config
from component.rope import extend_context, own_rope_type
from component.storage.result import library_versions
from component.tokenizer import any_pad_id, load_tokenizer
from component.train.argument import LongQLoRAArguments, parse_arguments
from component.train.callback import FullAttentionCallback
from component.train.summary import plan, summary
from component.train.trainer import LongQLoRATrainer
from component.train.zero import single_process_environment, zero_settings


@exit_on_user_error
def main() -> None:
    single_process_environment()
    args, training_args = parse_arguments(sys.argv[1:])
    resume = prepare_output_dir(
        training_args.output_dir, training_args.resume_from_checkpoint, args.overwrite_output_dir
    )
    set_seed(training_args.seed)
    limit_memory(args.memory_budget_gib)
    limit_kernels(args.use_flash_attn)
    extended = load_config(args.model_name_or_path)
    tokenizer = load_tokenizer(args.model_name_or_path, args.model_max_length)
    check_targets_early(extended, args.target_names)
    factor = extend_context(extended, args.model_max_length, args.rope_type or own_rope_type(extended))
    is_ours = attention_is_ours(args, extended)
    work, memory, expected, memory_line = plan_memory(args, training_args, extended, is_ours)
    train_set, eval_set, data_lines = load_data(args, training_args, tokenizer)
    config = copy.deepcopy(extended)
    config.use_cache = False  # only generation needs it
    if is_ours:
        is_full = not args.use_shift_short_attention or args.full_attention_ratio > 0
        use_shift_short_attention(config, args.group_tokens, args.max_seq_length if is_full else 0)
    model = load_base(
        args.model_name_or_path,
        config,
        dtype=compute_dtype(training_args.fp16, training_args.bf16),
        load_in_4bit=args.load_in_4bit,
        device=None if is_deepspeed_zero3_enabled() else training_args.device,
    )
    model = add_adapter(
        model,
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        target_names=args.target_names,
        train_embedding=args.train_embedding,
        train_norm=args.train_norm,
    )
    no_plan: str | None = "memory_plan: false"
    if args.memory_plan:
        no_plan = use_memory_plan(model, memory, fused=work.fused)
        # a plan computes again what it must; without one, transformers does it (5.23: activation_checkpointing)
        is_checkpointed = no_plan is not None and memory.keep_layers < work.layers
        training_args.gradient_checkpointing = training_args.activation_checkpointing = is_checkpointed
    trainer = LongQLoRATrainer(
        model=model,
        args=training_args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=RightPadCollator(any_pad_id(tokenizer)),
        callbacks=[FullAttentionCallback(args.full_attention_ratio)] if args.full_attention_ratio else None,
        processing_class=tokenizer,
        extended_config=extended,
        record=args.record(extended, factor) | {"versions": library_versions()},
    )
    if trainer.is_world_process_zero():
        lines = plan(args, training_args, trainer, extended, factor) | data_lines
        print(f"\n{summary(lines | {'memory': f'no plan, {no_plan}' if no_plan else memory_line})}\n", flush=True)
    with explaining_out_of_memory(work, memory):
        metrics = trainer.train(resume_from_checkpoint=resume).metrics | peak_memory()
        trainer.report("train", metrics if no_plan else metrics | expected.metrics)
    if trainer.eval_dataset is not None:
        trainer.report("eval", trainer.evaluate())
    trainer.save_state()
    trainer.save_model()


def attention_is_ours(args: LongQLoRAArguments, extended: PretrainedConfig) -> bool:
    """Whether training attends through component/attention; if not, through Hugging Face's full attention."""
    if args.use_shift_short_attention or args.packing:
        return True
    return args.memory_plan and has_plain_attention(extended, args.max_seq_length)  # then a plan can keep its output


def plan_memory(args: LongQLoRAArguments, training_args: TrainingArguments, extended: PretrainedConfig, is_ours: bool):
    """What memory and time depend on, the memory plan, its estimate, and a line for the summary."""
    stage, is_offloaded = zero_settings(training_args.deepspeed)
    work = workload(
        extended,
        target_names=args.target_names,
        rank=args.lora_rank,
        train_embedding=args.train_embedding,
        train_norm=args.train_norm,
        tokens=training_args.per_device_train_batch_size * args.max_seq_length,
        group=args.group_tokens or args.max_seq_length,
        value_bytes=compute_dtype(training_args.fp16, training_args.bf16).itemsize,
        in_4bit=args.load_in_4bit,
        fused=liger_runs() if args.use_liger_kernel is None else args.use_liger_kernel,
        optimizer=training_args.optim.value,
        zero=stage is not None,
        offload_optimizer=is_offloaded,
    )
    gpu_gib, host_gib = available_memory(work, args.memory_budget_gib, training_args.device)
    memory_options = args.memory_options if is_ours else args.memory_options | {"keep_attention_output": False}
    plan, expected = choose_plan(work, gpu_gib, host_gib, **memory_options)
    return work, plan, expected, describe_estimate(work, plan, expected, gpu_gib)


def load_data(args: LongQLoRAArguments, training_args: TrainingArguments, tokenizer):
    """Training samples, evaluation samples or None, and lines for the summary."""
    rows = {"packing": args.packing, "streaming": args.streaming, "seed": training_args.seed}
    sets, lines = {}, {}
    with training_args.main_process_first(desc="tokenising"):
        for field, source, how in (("train_file", args.train_file, rows), ("eval_file", args.eval_file, {})):
            if source is not None:
                sets[field], report = load_samples(source, tokenizer, field=field, **args.data, **how)
                lines[field] = str(report)
    return sets["train_file"], sets.get("eval_file"), lines


if __name__ == "__main__":
    main()
