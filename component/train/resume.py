"""Can a checkpoint be continued by a run as it is distributed now? With the losses of the run that wrote it."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from component.checkpoint import read_record
from component.data.source import texts_fingerprint
from component.distributed.strategy import Strategy
from component.error import UserError
from component.storage.fingerprint import fingerprint
from component.train.argument import LongQLoRAArguments

KEY, TRAINER_KEY, CONTENT_KEY = "distribution", "trainer", "content"  # of a checkpoint's record
# keys that a continued run cannot change -> what would be wrong
_MODEL = "what was trained so far would be read by another model"
_ORDER = "samples would repeat or be left out"
_OPTIMIZER = "the optimizer's states and its settings come from the checkpoint, so it would have no effect"
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
OF_TRAINER = ("seed", "data_seed", "optim", "learning_rate", "weight_decay", *_ADAM)
TOLD_OF_TRAINER = ("lr_scheduler_type", "warmup_steps", "max_grad_norm")
FIXED = {
    **dict.fromkeys(OF_TRAINER, _OPTIMIZER),
    **dict.fromkeys(("model_max_length", "rope_type", "rope_theta", "lora_rank", "lora_alpha"), _MODEL),
    **dict.fromkeys(("target_modules", "train_embedding", "train_norm"), _MODEL),
    **dict.fromkeys(("sft", "template", "max_seq_length", "truncation_policy", "packing", "streaming"), _ORDER),
    **dict.fromkeys(("seed", "data_seed"), _ORDER),
}
# keys that it can change, with other losses than without
TOLD = (
    *("model_name_or_path", "train_file", "load_in_4bit", "frozen_matmul", "position_skipping", "lora_dropout"),
    *("use_shift_short_attention", "full_attention_ratio", "eval_file", *TOLD_OF_TRAINER),
)


def distribution(
    strategy: Strategy, samples_per_step: int, training_args: TrainingArguments, args: LongQLoRAArguments
) -> dict[str, Any]:
    """What a record says about how a run was distributed and optimized, and about the files that it read."""
    return {
        "base_weights": fingerprint(args.model_name_or_path, weights_alone=True),
        CONTENT_KEY: content_of(args),
        KEY: {
            "processes": strategy.processes,
            "zero_stage": strategy.zero_stage,
            "sequence_parallel_size": strategy.sequence_processes,
            "samples_per_step": samples_per_step,
        },
        TRAINER_KEY: of_trainer(training_args),
    }


def of_trainer(training_args: TrainingArguments) -> dict[str, Any]:
    names = (*OF_TRAINER, *TOLD_OF_TRAINER)
    return {name: getattr(value := getattr(training_args, name), "value", value) for name in names}


def content_of(args: LongQLoRAArguments) -> dict[str, str | None]:
    """Fingerprints of what keys name: it may be something else under the same name when a run is resumed."""
    texts = {name: texts_fingerprint(getattr(args, name), name) for name in ("train_file", "eval_file")}
    return {"model_name_or_path": fingerprint(args.model_name_or_path), **texts}


def compared(args: LongQLoRAArguments, training_args: TrainingArguments) -> dict[str, Any]:
    """What `check_continuation` compares with the checkpoint's record."""
    chooses = training_args.load_best_model_at_end or training_args.save_strategy == "best"
    return args.compared | of_trainer(training_args) | {CONTENT_KEY: content_of(args), "chooses_best": chooses}


def check_continuation(
    checkpoint: str | None, strategy: Strategy, samples_per_step: int, arguments: dict[str, Any] | None = None
) -> dict[str, str]:
    """Refuse what would go on with other losses, in silence or with a traceback.

    Without DeepSpeed the number of processes and sequence_parallel_size may change; with it, the latter alone.

    Args:
        samples_per_step: of all processes and micro-batches.
        arguments: those of `compared`.

    Returns:
        The summary's line, by name, about keys that may change, with other losses; empty if none did.

    Raises:
        UserError: another engine or ZeRO stage than the checkpoint's, another number of processes under ZeRO,
            another number of samples per step, or keys that must be as they were.
    """
    if checkpoint is None:
        return {}
    record = read_record(checkpoint) or {}
    _check_distribution(checkpoint, record.get(KEY) or {}, strategy, samples_per_step)
    return _check_arguments(checkpoint, record, arguments or {})


def recorded_matmul(checkpoint: str | None) -> str | None:
    """`frozen_matmul` of the run that wrote `checkpoint`; None without a checkpoint."""
    return None if checkpoint is None else _matmul_of(read_record(checkpoint) or {})


def steps_of(checkpoint: str | None) -> int:
    """Optimizer steps that a checkpoint has been trained for; 0 without one."""
    steps = (read_record(checkpoint) or {}).get("steps") if checkpoint else None
    return steps if isinstance(steps, int) else 0


def _matmul_of(record: dict[str, Any]) -> str:
    """Records did not hold it at first, and then `auto`; both meant this."""
    found = (record.get("arguments") or {}).get("frozen_matmul", "auto")
    return "unquantized" if found == "auto" else found


def _check_distribution(checkpoint: str, then: dict[str, Any], strategy: Strategy, samples_per_step: int) -> None:
    is_deepspeed = strategy.zero_stage is not None
    was_deepspeed = any(Path(checkpoint).glob("global_step*"))
    stage, processes = then.get("zero_stage"), then.get("processes")
    problem = f"resume_from_checkpoint: {checkpoint} was written "
    if was_deepspeed != is_deepspeed or (stage is not None and stage != strategy.zero_stage):
        told = f" ZeRO-{stage}" if stage is not None else ""
        cure = f"set deepspeed to a file with{told or ' the same stage'}" if was_deepspeed else "leave deepspeed out"
        cure += f" and start {processes} {_plural(processes)}" if was_deepspeed and processes else ""
        raise UserError(
            f"{problem}{'by DeepSpeed' + told if was_deepspeed else 'without DeepSpeed'}, whose optimizer states this "
            f"run ({strategy}) cannot read; {cure}"
        )
    if is_deepspeed and processes is not None and processes != strategy.processes:
        raise UserError(
            f"{problem}by {strategy} on {processes} {_plural(processes)}, each with its part of the optimizer states, "
            f"and this run has {strategy.processes}; start {processes}"
        )
    samples = then.get("samples_per_step")
    if samples is not None and samples != samples_per_step:
        raise UserError(
            f"{problem}with {samples} samples a step, and this run takes {samples_per_step}, so that samples would "
            "repeat or be left out; change gradient_accumulation_steps until the product of "
            "per_device_train_batch_size, gradient_accumulation_steps and the number of processes, divided by "
            f"sequence_parallel_size, is {samples}"
        )


def _check_arguments(checkpoint: str, record: dict[str, Any], arguments: dict[str, Any]) -> dict[str, str]:
    then = {**(record.get("arguments") or {}), **(record.get(TRAINER_KEY) or {})}
    then |= {"group_size": record.get("group_size")}
    if record.get("arguments"):
        then["frozen_matmul"] = _matmul_of(record)
    if then.get("rope_type") is None and arguments.get("rope_type") is not None:  # written out what was the default
        then["rope_type"] = record.get("rope_type")
    changed = {key: (then[key], arguments[key]) for key in then if then[key] != arguments.get(key, then[key])}
    fixed = [f"{key}: {new}, but it was {old}: {FIXED[key]}" for key, (old, new) in changed.items() if key in FIXED]
    if fixed:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} was written by a run with other values; set them as they were, or "
            "start another run:\n  " + "\n  ".join(fixed)
        )
    told = [f"{key} {old} -> {new}" for key, (old, new) in changed.items() if key in (*TOLD, "group_size")]
    before, now = record.get(CONTENT_KEY) or {}, arguments.get(CONTENT_KEY) or {}  # older records have none
    others = [key for key in before if before[key] != now.get(key, before[key])]
    told += [f"{key} {arguments.get(key)} with other content" for key in others if key not in changed]
    on_others = "eval_file" in others if CONTENT_KEY in record else "eval_file" in changed
    if arguments.get("chooses_best") and then.get("eval_file") and on_others:
        raise UserError(
            f"eval_file: {arguments['eval_file']} is not what {checkpoint} was evaluated on, so the best checkpoint "
            "would be chosen by losses on different texts; evaluate on the same, or start another run"
        )
    return {"resumed": f"with other losses than an unbroken run: {', '.join(told)}"} if told else {}


def _plural(count: int) -> str:
    return "process" if count == 1 else "processes"
