"""Are all keys known and their values valid? One message with all problems, before any weight is loaded."""

import dataclasses
import typing

import torch
from transformers import TrainingArguments

from component.error import UserError
from component.train.argument import LongQLoRAArguments, read_command_line, unknown_key
from component.train.validation import cure_of, validate
from component.train.yaml_file import parse_value


def parse_arguments(argv: list[str]) -> tuple[LongQLoRAArguments, TrainingArguments]:
    """Command line and YAML file -> validated arguments.

    Raises:
        UserError: one message with all problems.
    """
    file, values = read_command_line(argv)
    ours, theirs = _hints(LongQLoRAArguments), _hints(TrainingArguments)
    known = theirs | ours
    problems: list[str] = []
    typed: dict[str, typing.Any] = {}
    for key, value in values.items():
        try:
            typed[key] = parse_value(value, known[key])
        except KeyError:
            problems.append(f"{key}: {unknown_key(str(key), known)}")
        except ValueError as error:
            cure = cure_of(key)
            problems.append(f"{key}: {error}" + (f"; use {cure}" if cure else ""))
    for item in dataclasses.fields(LongQLoRAArguments):
        if item.default is dataclasses.MISSING and item.name not in values:
            problems.append(f"{item.name}: missing; {item.metadata['help']}")
    problems += validate(typed)
    if problems:
        raise UserError(f"{file} has problems:\n" + "\n".join(f"  - {problem}" for problem in problems))
    args = LongQLoRAArguments(**{key: value for key, value in typed.items() if key in ours})
    return args, _training_arguments(file, {key: value for key, value in typed.items() if key not in ours})


def _training_arguments(file: str, values: dict) -> TrainingArguments:
    # with frozen weights, DDP has no unused parameters to search for; the record counts trained tokens
    values = {"ddp_find_unused_parameters": False, **values, "include_num_input_tokens_seen": "non_padding"}
    # transformers' default of 8 rows would take eight times the memory that training rows were planned for
    values.setdefault("per_device_eval_batch_size", 1)
    if not torch.cuda.is_available():
        values.setdefault("use_cpu", True)  # else DeepSpeed's processes don't find each other
    # renamed in transformers 5.23, which warns about the old name; the original project's YAMLs use it
    is_renamed = hasattr(TrainingArguments, "activation_checkpointing_kwargs")
    name = "activation_checkpointing" if is_renamed else "gradient_checkpointing"
    new_names = {"gradient_checkpointing": name, "gradient_checkpointing_kwargs": f"{name}_kwargs"}
    values = {new_names.get(key, key): value for key, value in values.items()}
    values.setdefault(f"{name}_kwargs", {"use_reentrant": False})  # needs no gradient at the embedding
    # each process reads its own share of a stream; dispatching from one process needs batches of equal length
    if isinstance(config := values.get("accelerator_config") or {}, dict):
        values["accelerator_config"] = {"dispatch_batches": False, **config}
    values["greater_is_better"] = False  # transformers' default is true for all metrics but loss
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, OSError) as error:  # OSError: accelerator_config may be a path
        raise UserError(f"{file}: {error}") from error
    if arguments.deepspeed and arguments.hf_deepspeed_config.mismatches:  # else the Trainer raises after loading
        contradictions = "\n  ".join(arguments.hf_deepspeed_config.mismatches)
        raise UserError(f'deepspeed: contradicts {file}; write "auto" in the DeepSpeed file for\n  {contradictions}')
    return arguments


def _hints(cls: type) -> dict[str, typing.Any]:
    # transformers documents `resume_from_checkpoint: true`, but its type hint lacks bool
    hints = {**typing.get_type_hints(cls), "resume_from_checkpoint": str | bool | None}
    return {item.name: hints[item.name] for item in dataclasses.fields(cls) if item.init}
