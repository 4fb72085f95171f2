"""Which models are measured, one after the other? How they are spelt, checked before the first loads, and let go.

A contender is `NAME=MODEL[:ADAPTER][@TOKENS]`: a model, an adapter around it, and the context it is stretched to. An
adapter folder may stand alone in MODEL's place: it knows its base.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from component.data.token_file import check_tokenizer, read_index
from component.error import UserError
from component.loading import load_model, locate, stretched_config
from component.rope import context_length, rope_factor
from component.tokenizer import tokenizer_in


@dataclass(frozen=True)
class Contender:
    name: str | None  # None for the only one, named by its own flags
    base_model: str | None
    peft_model: str | None
    context_size: int | None

    @property
    def field(self) -> str:
        """The flag that named it, for messages."""
        return "base_model" if self.name is None else f"--compare {self.name}"

    @property
    def adapter_field(self) -> str:
        return "peft_model" if self.name is None else f"--compare {self.name}"


def parse_contender(text: str) -> Contender:
    """The contender that `NAME=MODEL[:ADAPTER][@TOKENS]` spells.

    Raises:
        UserError: no name, or no model.
    """
    name, is_named, rest = text.partition("=")
    context = None if Path(rest).exists() else re.fullmatch(r"(.+)@(0*[1-9]\d*)", rest)
    path, tokens = (context[1], int(context[2])) if context else (rest, None)
    model, has_adapter, adapter = (path, "", "") if Path(path).exists() else path.partition(":")
    if not (name and is_named and model) or (has_adapter and not adapter):
        raise UserError(f"--compare: {text!r}; spell it NAME=MODEL, NAME=MODEL:ADAPTER, and @TOKENS to stretch it")
    if (Path(model) / "adapter_config.json").is_file() and not adapter:
        return Contender(name, None, model, tokens)
    return Contender(name, model, adapter or None, tokens)


def parse_contenders(texts: list[str]) -> list[Contender]:
    contenders = [parse_contender(text) for text in texts]
    names = [str(contender.name) for contender in contenders]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--compare: {name} names {names.count(name)} models; give each its own name")
    return contenders


def check_contender(contender: Contender, data_path: str) -> str:
    """Refuse what cannot be loaded, or tokens that are not this model's, before any weight is loaded.

    Returns:
        One line on whether the tokenizer was compared with the file's.
    """
    _, own, is_ours = locate(contender.base_model, contender.peft_model, contender.field, contender.adapter_field)
    stretched_config(own, contender.context_size, is_fixed=is_ours, field=contender.field)
    index = read_index(data_path)
    if index is None:
        return f"not checked: there is no index {Path(data_path).name}.json that says which one made the file"
    tokenizer = tokenizer_in(own)
    if tokenizer is None:
        return f"not checked: {own} holds none"
    check_tokenizer(index, tokenizer, data_path)
    return "the file's"


def load_contender(contender: Contender, *, load_in_4bit: bool, dtype: torch.dtype | None) -> PreTrainedModel:
    return load_model(
        contender.base_model,
        contender.peft_model,
        context_size=contender.context_size,
        load_in_4bit=load_in_4bit,
        dtype=dtype,
        field=contender.field,
        adapter_field=contender.adapter_field,
    )


def describe_model(model: PreTrainedModel, load_in_4bit: bool) -> dict[str, Any]:
    """What a result says of the model that gave it."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        "weights": "nf4" if load_in_4bit else dtype,
        "dtype": dtype,
        "attention": f"full ({model.config._attn_implementation})",
        "rope_type": model.config.rope_parameters["rope_type"],
        "rope_factor": rope_factor(model.config),
        "context_tokens": context_length(model.config),
    }
