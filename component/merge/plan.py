"""What does an adapter do to each tensor of its base? Planned before any tensor is read.

Names and shapes come from a model without weights, on PyTorch's meta device. PEFT adds the adapter to it, so scalings,
rank patterns and target layers are PEFT's own.
"""

import math
import re
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from component.adapter import find_adapter, fit_adapter, match_extras
from component.config import read_generation_config
from component.error import UserError
from component.merge.serving import served_config
from component.model import base_tensors, stored_quantization, tied_names, without_weights
from component.storage.tensor_reader import TensorRef, tensors_in


@dataclass
class TensorUpdate:
    """What an adapter does to one tensor of the base."""

    trained: TensorRef | None = None  # replaces it
    lora_a: TensorRef | None = None  # (rank, in)
    lora_b: TensorRef | None = None  # (out, rank)
    magnitude: TensorRef | None = None  # DoRA's, of each row (out,) of W + scaling B A; of an embedding (dimension,)
    scaling: float = 0.0
    is_embedding: bool = False  # its weight is (in, out)


@dataclass
class MergePlan:
    """Everything that a merge will write; no weights are read yet."""

    config: PretrainedConfig  # of the merged model
    generation_config: GenerationConfig | None
    dtype: torch.dtype  # of the merged weights
    tensors: dict[str, TensorRef]  # the base's, by name, in disk order
    changes: dict[str, TensorUpdate]
    quantized: set[str] = field(default_factory=set)  # replaced by the NF4 weights that training used

    def add_end(self, token: int | None) -> None:
        """Let generation also stop at `token`, if there is one."""
        if token is None or self.generation_config is None:
            return
        known = self.generation_config.eos_token_id
        known = known if isinstance(known, list) else [] if known is None else [known]
        if token not in known:
            self.generation_config.eos_token_id = [*known, token]

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor of the merged model."""
        return {
            name: (self.dtype if stored.dtype.is_floating_point else stored.dtype, stored.shape)
            for name, stored in self.tensors.items()
        }

    @property
    def size(self) -> int:
        """Bytes of the merged weights."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.layout.values())

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.layout.values())


def plan_merge(
    base: str, adapter: str, config: PretrainedConfig, *, dtype: torch.dtype, base_weights: str = "fp16"
) -> MergePlan:
    """Plan a merge: every tensor of base and adapter is accounted for, none is read.

    Args:
        base, adapter: folders or hub ids.
        config: the base's, extended.
        base_weights: `fp16`, the base's own; `nf4`, their dequantized NF4 weights, as 4-bit training used them.

    Raises:
        UserError: damaged, missing or unknown weights, weights of another shape, or an adapter that is not plain LoRA.
    """
    if stored_quantization(base):
        raise UserError(
            f"model_name_or_path: the weights of {base!r} are quantized to 4 bits, and a merge writes 16 or 32 bits; "
            "name the 16-bit model that they were made from with --model_name_or_path"
        )
    model = without_weights(config)
    merged = served_config(model.config)
    merged.dtype, merged.use_cache, merged.architectures = dtype, True, [type(model).__name__]
    tensors = base_tensors(base, model)
    quantized = _linear_weights(model) if base_weights == "nf4" else set()
    plan = MergePlan(merged, _generation_config(base, model), dtype, tensors, {}, quantized)
    tied = tied_names(model)
    adapter_config, file, extras = find_adapter(adapter)
    _check_kind(adapter_config, adapter)
    if extras is not None:
        for name, stored in match_extras(model, tensors_in(extras), extras).items():
            tensors[tied[0] if name in tied else name] = stored  # LoRA is added to these
            plan.quantized.discard(name)
    weights = tensors_in(file)
    adapted = fit_adapter(model, adapter_config, {key: stored.on_meta() for key, stored in weights.items()}, adapter)
    plan.changes = _updates(adapted, weights, set(model.state_dict()) | set(tensors) | set(tied), adapter)
    if tied:
        _tie(plan, *tied)
    return plan


def _linear_weights(model: PreTrainedModel) -> set[str]:
    """What 4-bit training quantizes: the weights of all linear layers but the head."""
    head = model.get_output_embeddings()
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return {f"{path}.weight" for path, layer in layers if layer is not head}


def _check_kind(config: LoraConfig, adapter: str) -> None:
    """Refuse adapters that are not W + scaling B A, or whose initialization changed the base."""
    file, cure = f"{adapter}: adapter_config.json", "merge it with PEFT itself"
    for name in ("lora_bias", "layer_replication", "target_parameters", "trainable_token_indices"):
        if getattr(config, name, None):
            raise UserError(f"{file}: {name} is {getattr(config, name)!r}, which is not supported here; {cure}")
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise UserError(f"{file}: init_lora_weights is {init!r}, which changed the base before training; {cure}")


def _updates(
    adapted: PeftModel, weights: dict[str, TensorRef], known: set[str], adapter: str
) -> dict[str, TensorUpdate]:
    """The updates by name of the base's tensor; every key of the adapter must be part of one."""
    changes: dict[str, TensorUpdate] = {}
    for key, stored in weights.items():
        path, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        match = re.fullmatch(r"(embedding_)?([AB])(\.weight)?|magnitude_vector(\.weight)?", part)
        if path and match:
            layer = adapted.base_model.model.get_submodule(path)
            variants = {type(variant) for variant in layer.lora_variant.values()}
            if type(layer) not in (lora.Linear, lora.Embedding) or variants - {
                DoraLinearVariant,
                DoraEmbeddingVariant,
            }:
                raise UserError(f"{adapter}: {key} is of a LoRA variant not supported here; merge it with PEFT itself")
            change = changes.setdefault(f"{path}.weight", TensorUpdate())
            change.scaling, change.is_embedding = layer.scaling["default"], isinstance(layer, lora.Embedding)
            setattr(change, f"lora_{match[2].lower()}" if match[2] else "magnitude", stored)
            continue
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name not in known:
            raise UserError(f"{adapter}: {key} is neither LoRA nor a weight of the base; merge it with PEFT itself")
        changes.setdefault(name, TensorUpdate()).trained = stored
    return changes


def _tie(plan: MergePlan, embedding: str, head: str) -> None:
    """Keep embedding and head tied if the adapter changes both alike; otherwise write two matrices."""
    ours, theirs = (plan.changes.get(name, TensorUpdate()) for name in (embedding, head))
    if ours == theirs or _is_one_copy(ours, theirs):
        plan.changes.pop(head, None)
        return
    plan.tensors[head] = plan.tensors[embedding]
    plan.config.tie_word_embeddings = False


def _is_one_copy(ours: TensorUpdate, theirs: TensorUpdate) -> bool:
    """Whether both are the same matrix: PEFT saves a fully trained tied weight twice."""
    if ours.trained is None or theirs.trained is None or ours.lora_a or theirs.lora_a:
        return False
    return torch.equal(ours.trained.read(), theirs.trained.read())


def _generation_config(base: str, model: PreTrainedModel) -> GenerationConfig | None:
    """The base's sampling values and special tokens, in a form that transformers saves."""
    config = read_generation_config(base) or model.generation_config
    if config is not None and not config.do_sample:
        # LLaMA2 ships sampling values with do_sample off, which transformers refuses to save
        config.temperature = config.top_p = config.top_k = None
    return config
