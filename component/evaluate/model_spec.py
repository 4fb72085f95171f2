"""Which models are evaluated? Checks before any is loaded, and loading.

A `ModelSpec` is written `NAME=MODEL[:ADAPTER][@TOKENS]`: a model, its adapter, and the context to which a plain base
is scaled. MODEL may also be an adapter folder, which records its base.
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import PretrainedConfig, PreTrainedModel

from component.data.token_file import check_tokenizer, index_path, read_index
from component.error import UserError
from component.loading import extended_config_of, load_model, resolve_model
from component.rope import context_length, rope_factor
from component.storage.foreign import reading
from component.tokenizer import tokenizer_in


@dataclass(frozen=True)
class ModelSpec:
    name: str | None  # None for the model of --base_model and --peft_model
    base_model: str | None
    peft_model: str | None
    context_size: int | None

    @property
    def field(self) -> str:
        """The flag to name in error messages."""
        return "base_model" if self.name is None else f"--compare {self.name}"

    @property
    def adapter_field(self) -> str:
        return "peft_model" if self.name is None else f"--compare {self.name}"


def parse_model_spec(text: str) -> ModelSpec:
    """Parse `NAME=MODEL[:ADAPTER][@TOKENS]`.

    Raises:
        UserError: no name, or no model.
    """
    name, is_named, rest = text.partition("=")
    context = None if Path(rest).exists() else re.fullmatch(r"(.+)@(0*[1-9]\d*)", rest)
    path, tokens = (context[1], int(context[2])) if context else (rest, None)
    model, has_adapter, adapter = (path, "", "") if Path(path).exists() else path.partition(":")
    if not (name and is_named and model) or (has_adapter and not adapter):
        raise UserError(f"--compare: {text!r}; use NAME=MODEL or NAME=MODEL:ADAPTER, and @TOKENS to scale a base")
    if (Path(model) / "adapter_config.json").is_file() and not adapter:
        return ModelSpec(name, None, model, tokens)
    return ModelSpec(name, model, adapter or None, tokens)


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
    source = resolve_model(spec.base_model, spec.peft_model, spec.field, spec.adapter_field).source
    index = read_index(data_path)
    if index is None:
        return f"not checked: there is no index {Path(data_path).name}.json that says which one made the file"
    tokenizer = tokenizer_in(source)
    if tokenizer is None:
        return f"not checked: {source} holds none"
    check_tokenizer(index, tokenizer, data_path)
    return "the file's"


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


def describe_model(model: PreTrainedModel, load_in_4bit: bool) -> dict[str, Any]:
    """What a result records about its model."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        "weights": "nf4" if load_in_4bit or hasattr(model.config, "quantization_config") else dtype,
        "dtype": dtype,
        "attention": f"full ({model.config._attn_implementation})",
        "rope_type": model.config.rope_parameters["rope_type"],
        "rope_factor": rope_factor(model.config),
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "context_tokens": context_length(model.config),
    }
