"""Will the Trainer accept its settings? Tried on a model of one layer, before the real one is loaded.

transformers checks optimizers, schedules and trackers, and the packages that they need, only when it builds them.
"""

import contextlib
import copy
import dataclasses
import enum
import re
from collections.abc import Iterator

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer, TrainingArguments

from component.error import UserError, first_line
from component.train.trainer import token_weighted_loss

STEPS = 100  # of the rehearsed schedule, so that warmup, plateau and decay are all computed


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


def rehearse(arguments: TrainingArguments) -> None:
    """Build the Trainer, its optimizer and its schedule for one layer, and step through them.

    Raises:
        UserError: one of them rejects its settings, or the hub to which results are to be pushed can't be reached.
    """
    random_state = torch.random.get_rng_state()
    if arguments.push_to_hub:
        with explained_settings(arguments, "push_to_hub"):
            HfApi().whoami(arguments.hub_token)
    arguments = copy.copy(arguments)
    arguments.push_to_hub = False  # else the repository would be created already
    if arguments.optim_target_modules:  # of GaLore and APOLLO, which look for them in the model
        arguments.optim_target_modules = "all-linear"
    with explained_settings(arguments, "output_dir"):  # if no other key is mentioned, the message has to do
        trainer = Trainer(
            OneLayer(), arguments, train_dataset=[{}], eval_dataset=[{}], compute_metrics=token_weighted_loss
        )
    with explained_settings(arguments, "optim", "optim_args"):
        optimizer = trainer.create_optimizer()
        _refuse_ignored_options(arguments, trainer.model)
    with explained_settings(arguments, "lr_scheduler_type", "lr_scheduler_kwargs"):
        schedule = trainer.create_scheduler(STEPS, optimizer)
    with explained_settings(arguments, "optim", "optim_args"):
        trainer.model(torch.ones(1, 2, device=arguments.device)).sum().backward()
        optimizer.step()
    with explained_settings(arguments, "lr_scheduler_type", "lr_scheduler_kwargs"):
        for _ in range(STEPS if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR) else 0):
            schedule.step()
    torch.random.set_rng_state(random_state)


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
    changed, words = _changed(arguments), re.findall(r"\w+", message)
    by_name = [key for key in changed if "_" in key and key in words]  # a name of one word may be there by chance
    values = {key: getattr(arguments, key) for key in changed}
    words = [word.lower() for word in words]
    return by_name or [key for key, text in values.items() if isinstance(text, str) and text.lower() in words]


def _refuse_ignored_options(arguments: TrainingArguments, model: nn.Module) -> None:
    without = copy.copy(arguments)
    without.optim_args = None
    of = Trainer.get_optimizer_cls_and_kwargs
    if arguments.optim_args and of(arguments, model) == of(without, model):
        optimizer = arguments.optim.value
        raise UserError(f"optim_args: {arguments.optim_args} has no effect on optim: {optimizer}; leave it out")


def _changed(arguments: TrainingArguments) -> list[str]:
    """The fields that are not at their default."""
    return [field.name for field in dataclasses.fields(arguments) if getattr(arguments, field.name) != field.default]


def _text(value: object) -> str:
    return str(value.value) if isinstance(value, enum.Enum) else str(value)
