"""Can a checkpoint be continued by a run as it is distributed now? With the losses of the run that wrote it."""

from pathlib import Path
from typing import Any

from component.checkpoint import read_record
from component.distributed.strategy import Strategy
from component.error import UserError

KEY = "distribution"  # of a checkpoint's record


def distribution(strategy: Strategy, samples_per_step: int) -> dict[str, Any]:
    """What a record says about how a run was distributed."""
    return {
        KEY: {
            "processes": strategy.processes,
            "zero_stage": strategy.zero_stage,
            "sequence_parallel_size": strategy.sequence_processes,
            "samples_per_step": samples_per_step,
        }
    }


def check_continuation(checkpoint: str | None, strategy: Strategy, samples_per_step: int) -> None:
    """Refuse what would go on with other losses, in silence or with a traceback.

    Without DeepSpeed the number of processes and sequence_parallel_size may change; with it, the latter alone.

    Args:
        samples_per_step: of all processes and micro-batches.

    Raises:
        UserError: another engine or ZeRO stage than the checkpoint's, another number of processes under ZeRO, or
            another number of samples per step.
    """
    if checkpoint is None:
        return
    then = (read_record(checkpoint) or {}).get(KEY) or {}
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


def _plural(count: int) -> str:
    return "process" if count == 1 else "processes"
