"""Will the Trainer accept its settings? Tried on a model of one layer, before the real one is loaded.

transformers checks optimizers, schedules and trackers, and the packages that they need, only when it builds them.
"""

import contextlib
import copy
import dataclasses
import enum
import math
import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory

from component.error import UserError, first_line

STEPS = 1000  # of the rehearsed schedule, where epochs decide how many there will be
POINTS = 100  # at which it is computed
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
OPTIMIZER_KEYS = ("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")  # of some


def rehearse(arguments: TrainingArguments) -> None:
    """Build the optimizer and its schedule for one layer, and step through them.

    Raises:
        UserError: one of them rejects its settings, or has no use for them.
    """
    given, arguments = arguments, copy.copy(arguments)
    if arguments.optim_target_modules:  # of GaLore and APOLLO, which look for them in the model
        arguments.optim_target_modules = "all-linear"
    with explained_settings(arguments, "optim", "optim_args"):
        layer = nn.Sequential(nn.Linear(2, 2, device=arguments.device))
        _refuse_unused(given, arguments, layer)
        optimizer = _optimizer(arguments, layer)
    total = arguments.max_steps if arguments.max_steps > 0 else STEPS
    with explained_settings(arguments, "lr_scheduler_type", "lr_scheduler_kwargs"):
        schedule = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            arguments.get_warmup_steps(total),
            total,
            arguments.lr_scheduler_kwargs,
        )
    with explained_settings(arguments, "optim", "optim_args"):
        layer(torch.ones(1, 2, device=arguments.device)).sum().backward()
        optimizer.step()
    with explained_settings(arguments, "lr_scheduler_type", "lr_scheduler_kwargs"):
        for step in range(0, total, math.ceil(total / POINTS)):  # of warmup, plateau and decay
            for rate in getattr(schedule, "lr_lambdas", ()):
                rate(step)


def _refuse_unused(given: TrainingArguments, arguments: TrainingArguments, model: nn.Module) -> None:
    """Refuse what was set for another optimizer: transformers ignores it."""
    found = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    for key in [key for key in OPTIMIZER_KEYS if key in _changed(given)]:
        without = copy.copy(arguments)
        setattr(without, key, FIELDS[key].default)
        try:
            is_unused = found == Trainer.get_optimizer_cls_and_kwargs(without, model)
        except ValueError:  # GaLore needs its target modules
            is_unused = False
        if is_unused:
            optim = arguments.optim.value
            raise UserError(f"{key}: {getattr(given, key)} has no effect on optim: {optim}; leave it out")


def _optimizer(arguments: TrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if is_optimizer_factory(kind):
        return kind()(model, **options)
    of = options.pop("params", None) or options.pop("model", None) or options.pop("optimizer_dict", None)
    return kind(of or model.parameters(), **options)


@contextlib.contextmanager
def explained_settings(arguments: TrainingArguments, *keys: str) -> Iterator[None]:
    """Names the keys to which a library's exception belongs: those that it mentions, else `keys`.

    Raises:
        UserError: in place of the exception; if no key is known, the exception passes.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        named = _mentioned(arguments, str(error)) or [key for key in keys if key in _changed(arguments)] or keys[:1]
        if not named:
            raise
        settings = ", ".join(f"{key}: {_text(getattr(arguments, key))}" for key in named)
        raise UserError(f"{settings}; {first_line(error)}") from error


def _mentioned(arguments: TrainingArguments, message: str) -> list[str]:
    """The keys that were set and whose name, or else value, is a word of the message."""
    if arguments.deepspeed and re.match(r"\d+ validation errors? for DeepSpeed", message):  # pydantic's
        return ["deepspeed"]
    changed, words = _changed(arguments), re.findall(r"\w+", message)
    by_name = [key for key in changed if "_" in key and key in words]  # a name of one word may be there by chance
    values = {key: getattr(arguments, key) for key in changed}
    words = [word.lower() for word in words]
    return by_name or [key for key, text in values.items() if isinstance(text, str) and text.lower() in words]


def _changed(arguments: TrainingArguments) -> list[str]:
    """The fields that are not at their default."""
    return [name for name, field in FIELDS.items() if getattr(arguments, name) != field.default]


def _text(value: object) -> str:
    return str(value.value) if isinstance(value, enum.Enum) else str(value)
