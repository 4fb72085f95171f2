"""Which models are evaluated? Checks before any is loaded, and loading.

A `ModelSpec` is written `NAME=MODEL[:ADAPTER][@TOKENS]`: a model, its adapter, and the context to which a plain base
is scaled. MODEL may also be an adapter folder, which records its base.
"""

import contextlib
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import PretrainedConfig, PreTrainedModel

from component.attention.interface import has_plain_attention
from component.data.token_file import check_tokenizer, index_path, read_index
from component.distributed.world import is_first_process
from component.error import UserError, naming
from component.loading import extended_config_of, load_model, resolve_model, trained_hash
from component.rope import context_length, rope_factor
from component.storage.fingerprint import fingerprint
from component.storage.foreign import reading
from component.tokenizer import tokenizer_hash, tokenizer_in


@dataclass(frozen=True)
class ModelSpec:
    name: str | None  # None for the model of --base_model and --peft_model
    base_model: str | None
    peft_model: str | None
    context_size: int | None
    flag: str | None = None  # the one that named it, if none of these

    @property
    def field(self) -> str:
        """The flag to name in error messages."""
        return self.flag or ("base_model" if self.name is None else f"--compare {self.name}")

    @property
    def adapter_field(self) -> str:
        return self.flag or ("peft_model" if self.name is None else f"--compare {self.name}")

    def __str__(self) -> str:
        """As it is written without its name, with absolute paths of folders."""
        places = [str(Path(place).resolve()) if Path(place).is_dir() else place for place in self._places]
        return ":".join(places) + (f"@{self.context_size}" if self.context_size else "")

    @property
    def _places(self) -> list[str]:
        return [place for place in (self.base_model, self.peft_model) if place]


def hashes_of(base_model: str | None, peft_model: str | None) -> dict[str, str | None]:
    """What a model's answers depend on besides names: its weights, configs and tokenizer, and those of an adapter."""
    origin = resolve_model(base_model, peft_model, "base_model", "peft_model")
    prints = {"base_fingerprint": fingerprint(origin.base), "adapter_fingerprint": fingerprint(origin.adapter)}
    return {"adapter_sha256": trained_hash(base_model, peft_model), **prints}


def hashes_of_evaluator(text: str) -> dict[str, str | None] | None:
    """`hashes_of` a model that is written without a name; None unless its folders are here."""
    spec = parse_evaluator(text, [])
    places = [place for place in (spec.base_model, spec.peft_model) if place]
    return hashes_of(spec.base_model, spec.peft_model) if all(Path(place).is_dir() for place in places) else None


def parse_model_spec(text: str) -> ModelSpec:
    """Parse `NAME=MODEL[:ADAPTER][@TOKENS]`.

    Raises:
        UserError: no name, or no model.
    """
    name, is_named, rest = text.partition("=")
    places = _places_in(rest)
    if not (name and is_named and places):
        raise UserError(f"--compare: {text!r}; use NAME=MODEL or NAME=MODEL:ADAPTER, and @TOKENS to scale a base")
    return ModelSpec(name, *places)


def parse_evaluator(text: str, compared: list[ModelSpec]) -> ModelSpec:
    """The model of `--evaluator`: one of --compare by its name, or `MODEL[:ADAPTER][@TOKENS]`.

    Raises:
        UserError: no model.
    """
    named = next((spec for spec in compared if spec.name == text), None)
    if named:
        return named
    places = _places_in(text)
    if not places:
        raise UserError(f"--evaluator: {text!r}; use MODEL or MODEL:ADAPTER, and @TOKENS to scale a base")
    return ModelSpec(None, *places, flag="--evaluator")


def _places_in(text: str) -> tuple[str | None, str | None, int | None] | None:
    """Base, adapter and context of `MODEL[:ADAPTER][@TOKENS]`; None if it is not of this form."""
    context = None if Path(text).exists() else re.fullmatch(r"(.+)@(0*[1-9]\d*)", text)
    path, tokens = (context[1], int(context[2])) if context else (text, None)
    model, has_adapter, adapter = (path, "", "") if Path(path).exists() else path.partition(":")
    if not model or (has_adapter and not adapter):
        return None
    if (Path(model) / "adapter_config.json").is_file() and not adapter:
        return None, model, tokens
    return model, adapter or None, tokens


def parse_model_specs(texts: list[str]) -> list[ModelSpec]:
    specs = [parse_model_spec(text) for text in texts]
    names = [str(spec.name) for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--compare: {name} names {names.count(name)} models; give each its own name")
    return specs


def local_tokens(source: str, field: str = "--data_path") -> str:
    """The file of token ids that a path or a hub id means; with the id's file, its index is downloaded too.

    Raises:
        UserError: there is none.
    """
    owner, _, rest = source.partition("/")
    dataset, _, name = rest.partition("/")
    if Path(source).is_file():
        return source
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", f"{owner}/{dataset}") or not name or Path(owner).is_dir():
        raise UserError(
            f"{field}: there is no file {source}; name a .bin file of token ids, or owner/dataset/FILE.bin on the hub"
        )
    with reading(f"{field}: there is no file {source}, nor can it be downloaded", "name a .bin file of token ids"):
        found = hf_hub_download(f"{owner}/{dataset}", name, repo_type="dataset")
    with contextlib.suppress(Exception):  # most files have no index
        hf_hub_download(f"{owner}/{dataset}", index_path(name).as_posix(), repo_type="dataset")
    return found


def check_model_spec(spec: ModelSpec, data_path: str) -> str:
    """Refuse, before any weight is loaded, a missing model, or a file of another tokenizer's tokens.

    Returns:
        Whether the model's tokenizer is the file's, in words; recorded in the result.
    """
    model_config(spec)
    source = _source(spec)
    index = read_index(data_path)
    if index is None:
        return f"not checked: there is no index {Path(data_path).name}.json that says which one made the file"
    tokenizer = tokenizer_in(source)
    if tokenizer is None:
        return f"not checked: {source} holds none"
    check_tokenizer(index, tokenizer, data_path)
    return "the file's"


def check_evaluator(evaluator: ModelSpec, measured: list[ModelSpec], data_path: str, longest: int) -> None:
    """Refuse, before any weight is loaded, an evaluator that can't find the key tokens of the models' windows.

    Args:
        longest: tokens of the longest window.

    Raises:
        UserError: its context is shorter than a window, or its tokenizer is another one.
    """
    context = context_length(model_config(evaluator))
    if context < longest:
        raise UserError(
            f"--evaluator: {evaluator} has a context of {context} tokens, but windows have {longest}; shorten "
            "--seq_len, or name a model with a longer context"
        )
    own = tokenizer_in(_source(evaluator))
    for spec in measured:
        other = tokenizer_in(_source(spec))
        if own and other and tokenizer_hash(own) != tokenizer_hash(other):
            raise UserError(
                f"--evaluator: the tokenizer of {evaluator} gives other ids than that of {spec}; name a model "
                "with the same tokenizer"
            )
    with naming("--evaluator"):
        check_model_spec(evaluator, data_path)


def _source(spec: ModelSpec) -> str:
    return resolve_model(spec.base_model, spec.peft_model, spec.field, spec.adapter_field).source


def model_config(spec: ModelSpec) -> PretrainedConfig:
    """The config that the model will have.

    Raises:
        UserError: there is no such model, or a context size that contradicts it.
    """
    _, source, is_ours, _ = resolve_model(spec.base_model, spec.peft_model, spec.field, spec.adapter_field)
    return extended_config_of(source, spec.context_size, is_fixed=is_ours, field=spec.field)


def files_read(specs: list[ModelSpec], data_path: str | None = None) -> dict[str, list[str | Path | None]]:
    """All that an evaluation reads, by the flag that names it: a result must not replace any of it."""
    found: dict[str, list[str | Path | None]] = {}
    if data_path:
        found["--data_path"] = [data_path, index_path(data_path)]
    for spec in specs:
        found_at = resolve_model(spec.base_model, spec.peft_model, spec.field, spec.adapter_field)
        for field, path in ((spec.field, found_at.base), (spec.adapter_field, found_at.adapter)):
            found.setdefault(f"--{field.removeprefix('--')}", []).append(path)
    return found


def load_model_spec(spec: ModelSpec, *, load_in_4bit: bool, dtype: str | None) -> PreTrainedModel:
    return load_model(
        spec.base_model,
        spec.peft_model,
        context_size=spec.context_size,
        load_in_4bit=load_in_4bit,
        dtype=getattr(torch, dtype) if dtype else None,
        field=spec.field,
        adapter_field=spec.adapter_field,
    )


def mind_context(config: PretrainedConfig, longest: int, field: str = "--lengths") -> None:
    """Say that texts of `longest` tokens exceed a model's context, if they do.

    transformers' own reminder is silenced: it does not know how far a model was extended.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    context = context_length(config)
    if longest > context and is_first_process():
        text = f"warning: {field}: {longest} tokens are beyond the model's context of {context}"
        print(text, file=sys.stderr, flush=True)


def describe_model(model: PreTrainedModel, load_in_4bit: bool) -> dict[str, Any]:
    """What a result records about its model."""
    dtype = str(model.dtype).removeprefix("torch.")
    is_full = has_plain_attention(model.config, context_length(model.config))
    kind = "full" if is_full else f"{model.config.model_type}'s own"  # a sliding window, softcapping, sinks
    return {
        "weights": "nf4" if load_in_4bit or hasattr(model.config, "quantization_config") else dtype,
        "dtype": dtype,
        "attention": f"{kind} ({model.config._attn_implementation})",
        "rope_type": model.config.rope_parameters["rope_type"],
        "rope_factor": rope_factor(model.config),
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "context_tokens": context_length(model.config),
    }
