"""What does an adapter do to each tensor of its base? Found out before any tensor is read.

No model is built: names and shapes come from one without weights, on PyTorch's meta device, and PEFT puts the adapter
around that one, so that scalings, rank patterns and what belongs where are PEFT's own.
"""

import math
import re
import sys
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners import lora
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from component.adapter import find_adapter, fit_adapter, match_extras
from component.error import UserError
from component.model import without_weights
from component.storage.tensor_reader import TensorRef, model_tensors, tensors_in

BASES = ("fp16", "nf4")


@dataclass
class TensorUpdate:
    """What an adapter does to one tensor of the base."""

    trained: TensorRef | None = None  # stands in its place
    lora_a: TensorRef | None = None  # (rank, in)
    lora_b: TensorRef | None = None  # (out, rank)
    scaling: float = 0.0
    is_embedding: bool = False  # whose weight is (in, out)


@dataclass
class MergePlan:
    """All that there is to do, nothing of it done yet."""

    config: PretrainedConfig  # of the merged model
    generation_config: GenerationConfig | None
    dtype: torch.dtype  # of its weights
    tensors: dict[str, TensorRef]  # of the base, by name, in the order that they lie on the disk
    changes: dict[str, TensorUpdate]
    quantised: set[str] = field(default_factory=set)  # taken as the NF4 weights that training saw

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of every tensor of the merged model."""
        return {
            name: (self.dtype if stored.dtype.is_floating_point else stored.dtype, stored.shape)
            for name, stored in self.tensors.items()
        }

    @property
    def size(self) -> int:
        """In bytes, of the merged weights."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.layout.values())

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.layout.values())


def plan_merge(
    base: str, adapter: str, config: PretrainedConfig, *, dtype: torch.dtype, base_weights: str = "fp16"
) -> MergePlan:
    """What the merged model is made of; every tensor of base and adapter accounted for, none of them read.

    Args:
        base, adapter: folders or hub ids.
        config: of the base, extended.
        base_weights: `fp16`, the base's own; `nf4`, what is left of them after training's 4-bit quantisation.

    Raises:
        UserError: weights that are damaged, missing, unknown or unfit, or an adapter that is more than LoRA.
    """
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"model_name_or_path: {base!r} holds quantised weights, to which nothing can be added; "
            "name the 16-bit model"
        )
    model = without_weights(config)
    merged = model.config
    merged.dtype, merged.use_cache, merged.architectures = dtype, True, [type(model).__name__]
    tensors = _of_model(base, model)
    is_quantised = base_weights == "nf4"
    plan = MergePlan(
        merged, _sampling(base, model), dtype, tensors, {}, _linear_weights(model) if is_quantised else set()
    )
    tied = _tied_names(model)
    adapter_config, file, extras = find_adapter(adapter)
    _check_kind(adapter_config, adapter)
    if extras is not None:
        for name, stored in match_extras(model, tensors_in(extras), extras).items():
            tensors[tied[0] if name in tied else name] = stored  # it is the base that LoRA goes around
            plan.quantised.discard(name)
    weights = tensors_in(file)
    adapted = fit_adapter(model, adapter_config, {key: stored.on_meta() for key, stored in weights.items()}, adapter)
    plan.changes = _updates(adapted, weights, set(model.state_dict()) | set(tensors) | set(tied), adapter)
    if tied:
        _tie(plan, *tied)
    return plan


def _of_model(base: str, model: PreTrainedModel) -> dict[str, TensorRef]:
    """The base's tensors that belong to `model`; a head that is its embedding is left out."""
    wanted, found, tied = model.state_dict(), model_tensors(base), _tied_names(model)
    for name in tied[1:]:
        if tied[0] not in found and name in found:  # saved under the head's name alone
            found[tied[0]] = found[name]
        wanted.pop(name)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(
            f"model_name_or_path: {base!r} lacks {len(missing)} weights of its config, as {missing[0]}; "
            "fetch the model again"
        )
    for name, tensor in wanted.items():
        if found[name].shape != tuple(tensor.shape):
            raise UserError(
                f"model_name_or_path: the weights of {base!r} do not fit the config: {name} is {found[name].shape} "
                f"instead of {tuple(tensor.shape)}; use the base model that config or adapter belongs to"
            )
    unused = [name for name in found if name not in wanted and name not in tied and "rotary_emb" not in name]
    if unused:
        print(f"{base}: {len(unused)} tensors belong to no layer and are left out, as {unused[0]}", file=sys.stderr)
    ordered = sorted(wanted, key=lambda name: (str(found[name].file), found[name].start or 0))
    return {name: found[name] for name in ordered}


def _tied_names(model: PreTrainedModel) -> list[str]:
    """The embedding's weight and the head's, where the two are one."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not model.config.tie_word_embeddings:
        return []
    names = {module: f"{path}.weight" for path, module in model.named_modules()}
    return [names[embedding], names[head]]


def _linear_weights(model: PreTrainedModel) -> set[str]:
    """What training in 4 bits quantises: the weights of all linear layers but the head."""
    head = model.get_output_embeddings()
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return {f"{path}.weight" for path, layer in layers if layer is not head}


def _check_kind(config: PeftConfig, adapter: str) -> None:
    """Refuse adapters that are something else than W + scaling B A, or that change the base when they are made."""
    kind = f"{adapter}: adapter_config.json"
    cure = "merge it with PEFT itself"
    if not isinstance(config, LoraConfig):
        raise UserError(f"{kind}: peft_type is {config.peft_type!s}, which is no LoRA; {cure}")
    for name in ("use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices"):
        if getattr(config, name, None):
            raise UserError(f"{kind}: {name} is {getattr(config, name)!r}, which is not merged here; {cure}")
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise UserError(f"{kind}: init_lora_weights is {start!r}, which changed the base before training; {cure}")


def _updates(
    adapted: PeftModel, weights: dict[str, TensorRef], known: set[str], adapter: str
) -> dict[str, TensorUpdate]:
    """By name of the base's tensor; every key of the adapter is one part of one change."""
    changes: dict[str, TensorUpdate] = {}
    for key, stored in weights.items():
        path, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        match = re.fullmatch(r"(embedding_)?([AB])(\.weight)?", part)
        if path and match:
            layer = adapted.base_model.model.get_submodule(path)
            if type(layer) not in (lora.Linear, lora.Embedding) or layer.lora_variant:
                raise UserError(f"{adapter}: {key} is of a kind of LoRA that is not merged here; use PEFT itself")
            change = changes.setdefault(f"{path}.weight", TensorUpdate())
            change.scaling, change.is_embedding = layer.scaling["default"], bool(match[1])
            setattr(change, f"lora_{match[2].lower()}", stored)
            continue
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name not in known:
            raise UserError(f"{adapter}: {key} is neither LoRA nor a weight of the base; merge it with PEFT itself")
        changes.setdefault(name, TensorUpdate()).trained = stored
    return changes


def _tie(plan: MergePlan, embedding: str, head: str) -> None:
    """One matrix as long as the adapter does the same to both of its uses; otherwise two."""
    ours, theirs = (plan.changes.get(name, TensorUpdate()) for name in (embedding, head))
    if ours == theirs or _is_one_copy(ours, theirs):
        plan.changes.pop(head, None)
        return
    plan.tensors[head] = plan.tensors[embedding]
    plan.config.tie_word_embeddings = False


def _is_one_copy(ours: TensorUpdate, theirs: TensorUpdate) -> bool:
    """PEFT saves a tied matrix that was trained whole twice."""
    if ours.trained is None or theirs.trained is None or ours.lora_a or theirs.lora_a:
        return False
    return torch.equal(ours.trained.read(), theirs.trained.read())


def _sampling(base: str, model: PreTrainedModel) -> GenerationConfig | None:
    """How the base wants to generate, in a form that can be saved."""
    try:
        sampling = GenerationConfig.from_pretrained(base)
    except OSError:  # it has no file of its own
        sampling = model.generation_config
    if sampling is not None and not sampling.do_sample:
        # LLaMA2 ships sampling values with sampling switched off, which transformers refuses to save
        sampling.temperature = sampling.top_p = sampling.top_k = None
    return sampling
