"""Extend the context of a Llama-family model with LongQLoRA: YAML in, adapter folder out.

    deepspeed train.py --train_args_file ./train_args/llama2-7b-pretrain.yaml
    deepspeed train.py --train_args_file ./train_args/vicuna-13b-sft.yaml --learning_rate 5e-5

`python` or `torchrun` can replace `deepspeed`. Any key of the YAML can be overridden as --key value.
"""

import copy
import gc
import sys
from typing import Any

from component.cli import exit_on_user_error, parsed_first
from component.train.argument import LongQLoRAArguments, read_command_line


@parsed_first
def read_flags() -> tuple[str, dict[str, Any]]:
    return read_command_line(sys.argv[1:])


from component.quick_import import import_bitsandbytes

import_bitsandbytes()

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments, set_seed

from component.adapter import add_adapter, check_targets_early
from component.attention.interface import use_shift_short_attention
from component.attention.kernel import limit_kernels
from component.checkpoint import claimed_output_dir, prepare_output_dir
from component.data.collator import RightPadCollator
from component.data.dataset import load_samples
from component.distributed.sequence import join_sequence_group
from component.distributed.strategy import Strategy, training_strategy
from component.distributed.world import leave_processes
from component.error import UserError
from component.memory.apply import use_memory_plan
from component.memory.budget import explaining_out_of_memory, limit_memory, peak_memory
from component.model import compute_dtype, load_base, load_config
from component.rope import depends_on_length, extend_context, original_context, own_rope_type
from component.shard import load_shards
from component.storage.result import library_versions
from component.tokenizer import any_pad_id, load_tokenizer
from component.train.callback import FullAttentionCallback, Startup
from component.train.failure import explained_failures, telling_termination
from component.train.model_check import check_model
from component.train.planning import Memory, plan_memory, uses_own_attention
from component.train.rehearsal import explained_settings, rehearse
from component.train.resume import check_continuation, compared, distribution, recorded_matmul, steps_of
from component.train.settings import parse_arguments
from component.train.summary import describe_cost, print_summary
from component.train.trainer import LongQLoRATrainer
from component.train.zero import single_process_environment


@exit_on_user_error
def main() -> None:
    single_process_environment()
    args, training_args = parse_arguments(sys.argv[1:])
    with claimed_output_dir(training_args.output_dir):
        run(args, training_args)
    leave_processes()


def run(args: LongQLoRAArguments, training_args: TrainingArguments) -> None:
    """The stages of a run, in order."""
    startup = Startup("imports")
    resume = prepare_output_dir(
        training_args.output_dir, training_args.resume_from_checkpoint, args.overwrite_output_dir
    )
    parts = args.sequence_parallel_size
    strategy = training_strategy(training_args.deepspeed, training_args.world_size, parts)
    samples = training_args.train_batch_size * training_args.gradient_accumulation_steps * strategy.data_processes
    join_sequence_group(parts)
    limit_memory(args.memory_budget_gib)
    rehearse(training_args)
    set_seed(training_args.seed)
    limit_kernels(args.use_flash_attn)

    # everything that can be checked without weights comes before they are loaded
    base = load_config(args.model_name_or_path)
    extended = copy.deepcopy(base)
    tokenizer = load_tokenizer(args.model_name_or_path, args.model_max_length)
    check_targets_early(extended, args.target_names)
    rope_type = args.rope_type or own_rope_type(extended)
    factor = extend_context(extended, args.model_max_length, rope_type, rope_theta=args.rope_theta)
    check_model(args, extended)
    check_batches(args, training_args, extended)
    args, memory = plan_memory(args, training_args, strategy, extended, recorded_matmul(resume))
    changed = check_continuation(resume, strategy, samples, compared(args, training_args))
    train_set, eval_set, data_lines = load_data(args, training_args, tokenizer, extended.vocab_size)
    startup.ended("samples")
    model = load_adapted(args, training_args, strategy, training_config(args, extended))
    fallback = apply_plan(args, training_args, strategy, model, memory)
    startup.ended("weights")
    part = training_args.process_index % parts
    with explained_settings(training_args):
        trainer = LongQLoRATrainer(
            model=model,
            args=training_args,
            train_dataset=train_set,
            eval_dataset=eval_set,
            data_collator=RightPadCollator(any_pad_id(tokenizer), part, parts, with_rows=args.position_skipping),
            callbacks=[FullAttentionCallback(args.full_attention_ratio)] if args.full_attention_ratio else None,
            processing_class=tokenizer,
            extended_config=extended,
            record=args.record(extended, factor)
            | {"original_tokens": original_context(extended), "versions": library_versions()}
            | distribution(strategy, samples, training_args, args),
            strategy=strategy,
            startup=startup,
            cuda_graph=args.cuda_graph,
            skipping_context=args.model_max_length if args.position_skipping else None,
        )
    lines = data_lines | ({"processes": strategy.describe(args.max_seq_length)} if strategy.processes > 1 else {})
    lines |= {"memory": f"no plan ({fallback})" if fallback else memory.line}
    plan = None if fallback else memory.plan
    cost, trainer.expected_time = describe_cost(args, training_args, trainer, memory.work, plan, steps_of(resume))
    lines |= cost
    print_summary(args, training_args, trainer, base, lines | changed | {"start": startup.describe()})
    train(trainer, resume, memory, fallback)


def check_batches(args: LongQLoRAArguments, training_args: TrainingArguments, extended: PretrainedConfig) -> None:
    """Refuse batches in which the positions of one sample would be scaled by the length of another."""
    if not depends_on_length(extended, args.max_seq_length):
        return
    sizes = {"per_device_train_batch_size": training_args.train_batch_size}
    if args.eval_file:
        sizes["per_device_eval_batch_size"] = training_args.eval_batch_size
    found = [f"{key}: {rows}; set it to 1" for key, rows in sizes.items() if rows > 1]
    found += ["packing: true; set it to false"] if args.packing else []
    if found:
        rope = extended.rope_parameters["rope_type"]
        raise UserError(
            f"{found[0]}: {rope} positions are scaled by the longest sample of a batch, so losses would depend on how "
            "samples are batched"
        )


def load_data(
    args: LongQLoRAArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, vocab_size: int
):
    """Training samples, evaluation samples or None, and the summary's lines about them."""
    data = args.data | {"vocab_size": vocab_size}
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    options = {"packing": args.packing, "streaming": args.streaming, "seed": seed}
    sets, lines = {}, {}
    with training_args.main_process_first(desc="tokenizing"):
        for field, source, more in (("train_file", args.train_file, options), ("eval_file", args.eval_file, {})):
            if source is not None:
                sets[field], report = load_samples(source, tokenizer, field=field, **data, **more)
                lines[field] = str(report)
    batch = training_args.train_batch_size * training_args.world_size // args.sequence_parallel_size
    if training_args.dataloader_drop_last and not args.streaming and len(sets["train_file"]) < batch:
        raise UserError(
            f"dataloader_drop_last: true, but {args.train_file} has {len(sets['train_file'])} samples and a batch "
            f"{batch}, so no step would be trained; set it to false, or use smaller batches"
        )
    return sets["train_file"], sets.get("eval_file"), lines


def training_config(args: LongQLoRAArguments, extended: PretrainedConfig) -> PretrainedConfig:
    """A copy of `extended` that selects the attention used in training; adapter folders get `extended` itself."""
    config = copy.deepcopy(extended)
    config.use_cache = False  # only generation needs it
    if uses_own_attention(args, extended):
        is_full = not args.use_shift_short_attention or args.full_attention_ratio > 0
        use_shift_short_attention(config, args.group_tokens, args.max_seq_length if is_full else 0)
    return config


def load_adapted(
    args: LongQLoRAArguments, training_args: TrainingArguments, strategy: Strategy, config: PretrainedConfig
) -> PeftModel:
    """The frozen base, in NF4 unless `load_in_4bit` is false, with a trainable adapter."""
    dtype = compute_dtype(training_args.fp16, training_args.bf16)
    load = load_shards if strategy.shards_weights else load_base
    model = load(
        args.model_name_or_path,
        config,
        dtype=dtype,
        load_in_4bit=args.load_in_4bit,
        device=training_args.device,
    )
    return add_adapter(
        model,
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        target_names=args.target_names,
        train_embedding=args.train_embedding,
        train_norm=args.train_norm,
        dtype=dtype if strategy.shards_weights else torch.float32,
    )


def apply_plan(
    args: LongQLoRAArguments, training_args: TrainingArguments, strategy: Strategy, model: PeftModel, memory: Memory
) -> str | None:
    """Apply the memory plan to `model`; None, or the reason why Hugging Face's own layers are used instead."""
    if not args.memory_plan:
        return "memory_plan: false"
    work = memory.work
    float8 = {"in_float8": work.in_float8, "float8_forward": work.float8_forward}
    fallback = use_memory_plan(model, memory.plan, fused=work.fused, strategy=strategy, **float8)
    # layers under a plan recompute by themselves; on fallback transformers' checkpointing does (5.23: activation_*)
    is_checkpointed = fallback is not None and memory.plan.keep_layers < work.layers
    training_args.gradient_checkpointing = training_args.activation_checkpointing = is_checkpointed
    return fallback


def train(trainer: LongQLoRATrainer, resume: str | None, memory: Memory, fallback: str | None) -> None:
    """Train, save, evaluate: an evaluation that fails loses nothing that was trained."""
    gc.collect()
    gc.freeze()  # what is there now lives on; a search of it for garbage takes 0.1 s, in each process at another step
    told = explained_settings(trainer.args), explained_failures(trainer), telling_termination(trainer)
    with explaining_out_of_memory(memory.work, memory.plan), told[0], told[1], told[2]:
        metrics = trainer.train(resume_from_checkpoint=resume).metrics | peak_memory()
    if not trainer.state.global_step:
        raise UserError("train_file: no step was trained, so nothing is saved; it has too few samples for a batch")
    trainer.report("train", metrics if fallback else metrics | memory.expected.metrics)
    trainer.save_state()
    trainer.save_model()
    if trainer.eval_dataset is not None:
        trainer.report("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
