"""How are the adapter on its base and the merged model run with a part of one weight in memory at a time?

A model without weights runs both as the two halves of one batch, as its own code says. Each of its modules that has
weights is replaced by a `Pair`: PEFT's module with the adapter unmerged, and the merged model's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from component.adapter import find_adapter, fit_adapter
from component.error import UserError
from component.merge.pair import Difference, Differences, Pair, Side, Source
from component.merge.plan import MergePlan
from component.model import load_config, without_weights
from component.storage.tensor_reader import TensorRef, model_tensors, tensors_in

HIDDEN = "hidden states"  # a kind of difference
ROTATION = 1e-2  # of cosines and sines: fp32 angles are off by that much at 10^5 tokens
# of hidden states, and of logits as a share of their standard deviation: rounding adds up over the layers
BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def _empty_model(config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    """The model of `config` without weights, but with its rotary frequencies on `device`."""
    model = without_weights(config).eval()
    for module in model.modules():
        own = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
        for name, buffer in own.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if own:
            model._init_weights(module)  # as transformers fills what is not in the files
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # only gradients depend on it, and parts of the rows may end before it
    return model


def _modules_with_weights(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if any(True for _ in module.parameters(False))}


def can_stream(config: PretrainedConfig) -> bool:
    """Whether a model consists of `layers` whose weights are all in linear layers, norms and embeddings."""
    model = without_weights(config)
    return isinstance(getattr(model.get_decoder(), "layers", None), nn.ModuleList) and all(
        isinstance(module, (nn.Linear, nn.Embedding)) or ("Norm" in type(module).__name__ and module.weight.ndim == 1)
        for module in _modules_with_weights(model).values()
    )


def _base_sources(plan: MergePlan, path: str, module: nn.Module, tied: str, dtype: torch.dtype) -> dict[str, Source]:
    """Where the weights of PEFT's module at `path` are: the adapter's as PEFT placed them, else the base's."""
    sources = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name.startswith("original_module."):
            continue  # replaced by a trained copy
        stored, own = getattr(parameter, "stored", None), f"{path}.{name.rpartition('.')[2]}"
        quantized_from = dtype if stored is None and own in plan.quantized else None
        sources[name] = Source(stored or plan.tensors.get(own) or plan.tensors[tied], quantized_from)
    return sources


def _tagged(stored: TensorRef) -> nn.Parameter:
    """A parameter without values that knows where they are; PEFT puts it where the weight belongs."""
    parameter = nn.Parameter(stored.on_meta(), requires_grad=False)
    parameter.stored = stored  # type: ignore[attr-defined]
    return parameter


def _merged_tensors(folder: Path, model: PreTrainedModel, tied: str) -> dict[str, TensorRef]:
    """The tensors of a merged model, under all names of the config.

    Raises:
        UserError: one is missing or has another shape.
    """
    stored = model_tensors(str(folder), "save_path")
    found: dict[str, TensorRef] = {}
    for name, tensor in model.state_dict().items():
        place = stored.get(name) or (stored.get(tied) if model.config.tie_word_embeddings else None)
        if place is None or place.shape != tuple(tensor.shape):
            raise UserError(
                f"--check: {folder} has no {name} of shape {tuple(tensor.shape)}, as its config says; merge again "
                "with --overwrite"
            )
        found[name] = place
    return found


@torch.no_grad()
def run_both(
    folder: Path,
    plan: MergePlan,
    adapter: str,
    config: PretrainedConfig,
    ids: Tensor,
    position_ids: Tensor,
    bound: float,
) -> tuple[dict[str, Difference], Tensor, Tensor]:
    """Run the adapter on its base and the merged model in `folder`, in fp32, and compare them on the way.

    Args:
        config: the base's, extended.
        ids, position_ids: (B, T), on the device to be used.
        bound: of the hidden states' relative difference.

    Returns:
        The differences by the merged model's names of tensors; logits (B, T, V) of the adapter and the merged model.

    Raises:
        UserError: weights are missing.
    """
    device = ids.device
    shell, merged = _empty_model(config, device), _empty_model(load_config(str(folder), "save_path"), device)
    adapter_config, file, _ = find_adapter(adapter)
    tagged = {key: _tagged(stored) for key, stored in tensors_in(file).items()}
    adapted = fit_adapter(_empty_model(config, device), adapter_config, tagged, adapter).eval().base_model.model
    units = _modules_with_weights(shell)
    tied = next(f"{path}.weight" for path, module in units.items() if module is shell.get_input_embeddings())
    tensors = _merged_tensors(folder, merged, tied)
    found = Differences()
    for path, module in units.items():
        theirs = merged.get_submodule(path)
        sources = {name: Source(tensors[f"{path}.{name}"]) for name, _ in theirs.named_parameters()}
        ours = adapted.get_submodule(path)
        base = _base_sources(plan, path, ours, tied, sources["weight"].stored.dtype)
        pair = Pair(path.rpartition(".")[2], Side(ours, base), Side(theirs, sources), found)
        module.forward = pair.embed if pair.is_embedding else pair.transform
    for path, module in shell.named_modules():
        if hasattr(module, "inv_freq"):
            module.forward = _rotations(adapted.get_submodule(path), merged.get_submodule(path), found)
    for index, layer in enumerate(shell.get_decoder().layers):
        difference = found.of_output(f"{HIDDEN} after layer {index}", HIDDEN, bound)
        layer.register_forward_hook(_comparing(difference))
    logits = shell(input_ids=ids.repeat(2, 1), position_ids=position_ids.repeat(2, 1), use_cache=False).logits
    ours, theirs = logits.chunk(2)
    return found.of, ours, theirs


def _rotations(adapted: nn.Module, merged: nn.Module, found: Differences) -> Callable[..., tuple[Tensor, Tensor]]:
    """The rotary embeddings of both configs."""
    difference = found.of_output("rope_parameters in config.json", "rotary embedding", ROTATION)

    def forward(hidden: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        halves = zip(hidden.chunk(2), position_ids.chunk(2), (adapted, merged), strict=True)
        ours, theirs = (module(values, places, *args, **options) for values, places, module in halves)
        for of_ours, of_theirs in zip(ours, theirs, strict=True):
            difference.add(of_ours, of_theirs)
        cos, sin = (torch.cat(both) for both in zip(ours, theirs, strict=True))
        return cos, sin

    return forward


def _comparing(difference: Difference) -> Callable[..., None]:
    """A forward hook that compares the two halves of a layer's output."""

    def hook(_module: nn.Module, _inputs: tuple, output: Any) -> None:
        difference.add(*(output[0] if isinstance(output, tuple) else output).chunk(2))

    return hook
