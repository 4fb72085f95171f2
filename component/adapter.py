"""What trains, and how is it put around a base? LoRA on every linear layer, and embeddings and norms where asked.

LoRA (arXiv 2106.09685): y = W x + (alpha / rank) B A x, W frozen. QLoRA (2305.14314, section 4) found that it takes
adapters on *all* linear layers to match full fine-tuning. Embeddings and norms train as full copies (PEFT's
`modules_to_save`), as LongLoRA (2309.12307, section 3.3) does for low ranks.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)

from component.error import UserError, first_line, nearest
from component.model import without_weights
from component.storage.tensor_reader import TensorRef, read_weights

Weight = TypeVar("Weight", torch.Tensor, TensorRef)
LEGACY_EXTRAS = "trainable_params.bin"  # LongLoRA's file of trained embeddings and norms, beside the LoRA weights


def linear_names(model: PreTrainedModel) -> list[str]:
    """The names, as in `q_proj`, of the linear layers of `model`, its output embedding (lm_head) left out."""
    head = model.get_output_embeddings()
    return sorted(
        {name.rpartition(".")[2] for name, layer in model.named_modules() if _is_linear(layer) and layer is not head}
    )


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear)  # bitsandbytes' Linear4bit is one too


def target_layers(model: PreTrainedModel, names: list[str]) -> list[tuple[str, nn.Module]]:
    """The linear layers, with their paths, that one of `names` is or ends the path of."""
    layers = [(path, layer) for path, layer in model.named_modules() if _is_linear(layer)]
    return [(path, layer) for path, layer in layers if any(f".{path}".endswith(f".{name}") for name in names)]


def check_targets(model: PreTrainedModel, names: list[str]) -> None:
    """Every name must be, or end the path of, a linear layer.

    Raises:
        UserError: a name matches nothing, even if the others match.
    """
    for wanted in names:
        if not target_layers(model, [wanted]):
            known = sorted({path.rpartition(".")[2] for path, layer in model.named_modules() if _is_linear(layer)})
            raise UserError(
                f"target_modules: {wanted!r} is no linear layer of this model{nearest(wanted, known)}; "
                f"it has {', '.join(known)}"
            )


def full_copies(model: PreTrainedModel, train_embedding: bool, train_norm: bool) -> list[str]:
    """The names of the modules that are trained whole. Tied embeddings are named once."""
    names = set()
    if train_embedding:
        modules = [model.get_input_embeddings()]
        if not model.config.tie_word_embeddings:
            modules.append(model.get_output_embeddings())
        names |= {
            name.rpartition(".")[2] for name, module in model.named_modules() if any(module is m for m in modules)
        }
    if train_norm:
        names |= {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
        }
    return sorted(names)


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_names: list[str] | None = None,
    train_embedding: bool = False,
    train_norm: bool = False,
) -> PeftModel:
    """Freeze `model` and put trainable LoRA, and copies of embeddings and norms if asked, around it.

    Args:
        target_names: linear layers that get LoRA; None for all of them but lm_head.

    Raises:
        UserError: a target that is no linear layer of the model.
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
        if parameter.requires_grad:  # optimizers step in fp32; DeepSpeed's half precision keeps its own fp32 masters
            parameter.data = parameter.data.float()
    return adapted


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without a warning that is for PEFT: it asks transformers by a name that will be dropped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def check_adapter(source: str, field: str) -> None:
    """Refuse what is neither a folder nor looks like a hub id."""
    if not Path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise UserError(f"{field}: there is no adapter folder {source}; name one, or a hub id")


def load_adapter(model: PreTrainedModel, source: str) -> PeftModel:
    """`model` with the adapter in a folder or on the hub around it, frozen, every weight of both accounted for.

    Reads our folders, PEFT's, and the original projects': `adapter_model.bin` and LongLoRA's `trainable_params.bin`.

    Raises:
        UserError: no adapter there, damaged files, or weights that do not fit the model.
    """
    config, file, extras = find_adapter(source)
    weights = read_weights(file)
    if extras is not None:
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, value in match_extras(model, read_weights(extras), extras).items():
            own[name].data.copy_(value)
    return fit_adapter(model, config, weights, source).eval()


def find_adapter(source: str) -> tuple[PeftConfig, Path, Path | None]:
    """The config of the adapter in a folder or on the hub, its file of weights, and LongLoRA's second one or None.

    Raises:
        UserError: no adapter there.
    """
    try:
        config = PeftConfig.from_pretrained(source)
    except (ValueError, OSError, TypeError, KeyError) as error:
        reason = first_line(error)
        raise UserError(
            f"{source} is no adapter: its adapter_config.json cannot be read ({reason}); "
            "name a folder that training wrote"
        ) from error
    config.inference_mode = True
    names = ("adapter_model.safetensors", "adapter_model.bin")
    file, extras = _fetch(source, *names), _fetch(source, LEGACY_EXTRAS)
    if file is None:
        raise UserError(f"{source} is no adapter: it holds neither {' nor '.join(names)}; name a folder of a run")
    return config, file, extras


def fit_adapter(
    model: PreTrainedModel, config: PeftConfig, weights: dict[str, torch.Tensor], source: str
) -> PeftModel:
    """The adapter of `config` and `weights` around `model`; all on the meta device, where `model` is there.

    Raises:
        UserError: a weight that is missing, belongs nowhere or has another shape than the model asks for.
    """
    cure = "use the base model that it was trained on"
    is_empty = model.device.type == "meta"
    config.base_model_name_or_path = None  # which PEFT sets; it would warn of the same folder under another name
    try:
        with quiet_peft():
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=is_empty)
        result = set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=is_empty)
    except (
        RuntimeError,
        ValueError,
    ) as error:  # sizes that mismatch, spelt over many lines; targets that are not there
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source} does not fit this base model ({reason}); {cure}") from error
    except KeyError as error:  # PEFT looks up each of `modules_to_save` before it counts what is missing
        raise UserError(f"{source} does not fit this base model: {error.args[0]} is missing; {cure}") from error
    missing = [key for key in result.missing_keys if _is_adapter_weight(key)]
    unknown = list(result.unexpected_keys)
    if missing or unknown:
        parts = [f"{len(missing)} weights are missing, as {missing[0]}"] if missing else []
        parts += [f"{len(unknown)} belong nowhere, as {unknown[0]}"] if unknown else []
        raise UserError(f"{source} does not fit this base model: {' and '.join(parts)}; {cure}")
    return adapted


def _is_adapter_weight(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def _fetch(source: str, *names: str) -> Path | None:
    """The first of the files `names` in a folder or hub repository; None if it holds none of them."""
    for name in names:
        if Path(source).is_dir():
            if (Path(source) / name).is_file():
                return Path(source) / name
            continue
        try:
            return Path(hf_hub_download(source, name))
        except Exception:  # absent, offline or gated: the next name
            continue
    return None


def match_extras(model: PreTrainedModel, weights: dict[str, Weight], file: Path) -> dict[str, Weight]:
    """LongLoRA's trained embeddings and norms, by their names in the base: they go into it before LoRA goes around it.

    Raises:
        UserError: a weight that the base does not have, or has in another shape.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    matched = {}
    for key, value in weights.items():
        name = key.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        if name not in own:
            raise UserError(f"{file}: {key} is no weight of this base model; use the one it was trained on")
        if own[name].shape != value.shape:
            hint = "; use the base model that it was trained on"
            if value.shape[0] == own[name].shape[0] + 1:
                hint = "; the extra row is a pad token that was added for training: use a base resized in the same way"
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
    """Refuse a target that is no linear layer of the model, before any weight is loaded."""
    if target_names is not None:
        check_targets(without_weights(config), target_names)
