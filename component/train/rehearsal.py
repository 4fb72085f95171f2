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
from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory

from component.error import UserError, first_line

STEPS = 1000  # of the rehearsed schedule, where epochs decide how many there will be
POINTS = 100  # at which it is computed


def rehearse(arguments: TrainingArguments) -> None:
    """Build the optimizer and its schedule for one layer, and step through them.

    Raises:
        UserError: one of them rejects its settings, or the hub to which results are to be pushed can't be reached.
    """
    if arguments.push_to_hub:
        with explained_settings(arguments, "push_to_hub"):
            HfApi().whoami(arguments.hub_token)
    arguments = copy.copy(arguments)
    if arguments.optim_target_modules:  # of GaLore and APOLLO, which look for them in the model
        arguments.optim_target_modules = "all-linear"
    with explained_settings(arguments, "optim", "optim_args"):
        layer = nn.Sequential(nn.Linear(2, 2, device=arguments.device))
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


def _optimizer(arguments: TrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    without = copy.copy(arguments)
    without.optim_args = None
    if arguments.optim_args and (kind, options) == Trainer.get_optimizer_cls_and_kwargs(without, model):
        optim = arguments.optim.value
        raise UserError(f"optim_args: {arguments.optim_args} has no effect on optim: {optim}; leave it out")
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
    return [field.name for field in dataclasses.fields(arguments) if getattr(arguments, field.name) != field.default]


def _text(value: object) -> str:
    return str(value.value) if isinstance(value, enum.Enum) else str(value)
