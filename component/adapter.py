"""Which parameters are trained, and how is an adapter attached to a base?

LoRA (arXiv 2106.09685): y = W x + (alpha / rank) B A x, W frozen. QLoRA (2305.14314, section 4) found that matching
full fine-tuning takes LoRA on *all* linear layers. Embeddings and norms can be trained in full (PEFT's
`modules_to_save`), as in LongLoRA (2309.12307, section 3.3).
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from component.adapter_config import check_patterns, read_adapter_config
from component.error import UserError, nearest
from component.model import without_weights
from component.storage.foreign import read_object, reading
from component.storage.hub import check_links, check_source, fetch
from component.storage.tensor_reader import TensorRef, is_finite, read_weights

Weight = TypeVar("Weight", torch.Tensor, TensorRef)
ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LEGACY_EXTRAS = "trainable_params.bin"  # LongLoRA's trained embeddings and norms


def linear_names(model: PreTrainedModel) -> list[str]:
    """Module names such as `q_proj` of all linear layers but the output embedding (lm_head)."""
    head = model.get_output_embeddings()
    return sorted({path.rpartition(".")[2] for path, layer in _linear_layers(model) if layer is not head})


def _linear_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    # bitsandbytes' Linear4bit is a subclass
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]


def target_layers(model: PreTrainedModel, names: list[str]) -> list[tuple[str, nn.Module]]:
    """(path, layer) of the linear layers whose path is, or ends in, one of `names`."""
    layers = _linear_layers(model)
    return [(path, layer) for path, layer in layers if any(f".{path}".endswith(f".{name}") for name in names)]


def check_targets(model: PreTrainedModel, names: list[str]) -> None:
    """Check that each of `names` selects a linear layer.

    Raises:
        UserError: a name matches no layer; PEFT would ignore it if others match.
    """
    for wanted in names:
        if not target_layers(model, [wanted]):
            known = sorted({path.rpartition(".")[2] for path, _ in _linear_layers(model)})
            hint = nearest(wanted, known)
            raise UserError(f"target_modules: {wanted!r} is not a linear layer{hint}; choose from {', '.join(known)}")


def full_copies(model: PreTrainedModel, train_embedding: bool, train_norm: bool) -> list[str]:
    """Names of the modules to train in full; tied embeddings are named once."""
    modules: list[nn.Module] = []
    if train_embedding:
        modules.append(model.get_input_embeddings())
        if not model.config.tie_word_embeddings:
            modules.append(model.get_output_embeddings())
    if train_norm:
        modules += [m for m in model.modules() if type(m).__name__.endswith(("RMSNorm", "LayerNorm"))]
    wanted = {id(m) for m in modules}
    return sorted({path.rpartition(".")[2] for path, m in model.named_modules() if id(m) in wanted})


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_names: list[str] | None = None,
    train_embedding: bool = False,
    train_norm: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """Freeze `model` and add trainable LoRA, and trainable copies of embeddings and norms if asked.

    Args:
        target_names: linear layers that get LoRA; None for all but lm_head.
        dtype: of what is trained. Optimizers update in fp32; DeepSpeed keeps its own fp32 master weights, and converts
            what is trained to half precision itself, except where ZeRO-3 loaded the base.

    Raises:
        UserError: a target that is not a linear layer of the model.
    """
    if target_names is not None:
        check_targets(model, target_names)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_names or linear_names(model),
        modules_to_save=full_copies(model, train_embedding, train_norm) or None,
        ensure_weight_tying=train_embedding and model.config.tie_word_embeddings,
    )
    with quiet_peft():
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Suppress a deprecation warning caused by PEFT's own call into transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def check_adapter(source: str, field: str) -> None:
    """Raise a `UserError` if `source` is neither a folder nor looks like a hub id."""
    check_source(source, field, "adapter folder")


def load_adapter(model: PreTrainedModel, source: str) -> PeftModel:
    """`model` with the adapter of a folder or hub repository, frozen and in evaluation mode.

    Reads our folders, PEFT's, and the original projects' (`adapter_model.bin`, LongLoRA's `trainable_params.bin`).
    Missing or unexpected weights are errors.

    Raises:
        UserError: no adapter, damaged files, or weights that do not fit the model.
    """
    config, file, extras = find_adapter(source)
    weights = _finite_weights(file)
    if extras is not None:
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, value in match_extras(model, _finite_weights(extras), extras).items():
            own[name].data.copy_(value)
    return fit_adapter(model, config, weights, source).eval()


def _finite_weights(file: Path) -> dict[str, torch.Tensor]:
    weights = read_weights(file)
    for name, value in weights.items():
        if not is_finite(value):
            raise UserError(f"{file}: {name} holds infinite or NaN values; use another checkpoint, or train it again")
    return weights


def find_adapter(source: str) -> tuple[LoraConfig, Path, Path | None]:
    """An adapter's config, weight file, and LongLoRA's `trainable_params.bin` or None.

    Raises:
        UserError: `source` is not an adapter.
    """
    cure = "name a folder written by training"
    with reading(f"{source} is not an adapter", cure):
        check_links(source)
        found = _fetch(source, ADAPTER_CONFIG)
        if found is None:
            raise ValueError(f"it has no {ADAPTER_CONFIG}")
        config = read_adapter_config(found)
    config.inference_mode = True
    file, extras = _fetch(source, *WEIGHT_FILES), _fetch(source, LEGACY_EXTRAS)
    if file is None:
        raise UserError(f"{source} is not an adapter: no {' or '.join(WEIGHT_FILES)}; {cure}")
    return config, file, extras


def named_base(source: str) -> str | None:
    """The base model that an adapter's adapter_config.json names."""
    file = _fetch(source, ADAPTER_CONFIG)
    base = read_object(file).get("base_model_name_or_path") if file else None
    return base if isinstance(base, str) and base else None


def adapter_hash(source: str) -> str | None:
    """sha256 of an adapter's weight file, in hexadecimal: folders are moved and renamed."""
    file = _fetch(source, *WEIGHT_FILES)
    if file is None:
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fit_adapter(
    model: PreTrainedModel, config: LoraConfig, weights: dict[str, torch.Tensor], source: str
) -> PeftModel:
    """`model` with the adapter given by `config` and `weights`; on the meta device if `model` is.

    Raises:
        UserError: a weight that is missing, unexpected or of the wrong shape.
    """
    cure = "use the base model that it was trained on"
    is_empty = model.device.type == "meta"
    config.base_model_name_or_path = None  # set by PEFT; it warns if the same folder has another name
    check_patterns(config, [name for name, _ in model.named_modules()], source)
    with reading(f"{source} does not fit this base model", cure):  # shapes, and modules that are missing
        with quiet_peft():
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=is_empty)
        result = set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=is_empty)
    missing = [key for key in result.missing_keys if ".lora_" in key or ".modules_to_save." in key]
    unexpected = list(result.unexpected_keys)
    if missing or unexpected:
        parts = [f"{len(missing)} weights are missing, such as {missing[0]}"] if missing else []
        parts += [f"{len(unexpected)} weights are unexpected, such as {unexpected[0]}"] if unexpected else []
        raise UserError(f"{source} does not fit this base model: {' and '.join(parts)}; {cure}")
    return adapted


def _fetch(source: str, *names: str) -> Path | None:
    """The first of the files `names` that a folder or hub repository has, or None."""
    for name in names:
        if found := fetch(source, name):
            return found
    return None


def match_extras(model: PreTrainedModel, weights: dict[str, Weight], file: Path) -> dict[str, Weight]:
    """LongLoRA's trained embeddings and norms by parameter name of the base, which they replace before LoRA is added.

    Raises:
        UserError: a weight that the base does not have, or has in another shape.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    matched = {}
    for key, value in weights.items():
        name = key.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        if name not in own:
            raise UserError(f"{file}: {key} is not a weight of this base model; use the one it was trained on")
        if own[name].shape != value.shape:
            hint = "; use the base model that it was trained on"
            if value.shape[0] == own[name].shape[0] + 1:
                hint = "; the extra row is a pad token added for training: use a base resized in the same way"
            raise UserError(f"{file}: {key} is {tuple(value.shape)}, the base has {tuple(own[name].shape)}{hint}")
        matched[name] = value
    return matched


def trainable_counts(model: nn.Module) -> dict[str, int]:
    """Trainable parameters by kind: `LoRA`, `embeddings`, `norms`."""
    counts = {"LoRA": 0, "embeddings": 0, "norms": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "LoRA" if ".lora_" in name else "norms" if "norm" in name else "embeddings"
            counts[kind] += getattr(parameter, "ds_numel", parameter.numel())
    return {kind: count for kind, count in counts.items() if count}


def check_targets_early(config: PretrainedConfig, target_names: list[str] | None) -> None:
    """`check_targets` from the config alone, before weights are loaded."""
    if target_names is not None:
        check_targets(without_weights(config), target_names)
