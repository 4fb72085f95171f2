"""How does each process of ZeRO-3 load its shard of a frozen base? Module by module.

Hugging Face's loader would put a whole 4-bit model on every GPU before DeepSpeed partitions it, and read all files in
every process. Here the processes take turns: one reads a weight, quantizes it in 4-bit training and sends it to the
others, and each keeps its shard. No process holds more than one decoder layer as a whole, besides the scales of 4-bit
blocks (1/64 byte a weight), which DeepSpeed does not partition.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import deepspeed_config
from transformers.quantizers.auto import AutoHfQuantizer

from component.config import read_generation_config
from component.error import UserError
from component.model import (
    base_tensors,
    disable_cpu_repacking,
    lacking,
    not_finite,
    stored_quantization,
    tied_names,
    training_quantization,
)
from component.rope import forget_lengths
from component.storage.hub import check_links
from component.storage.tensor_reader import TensorRef, is_finite, model_tensors


class _Base(NamedTuple):
    source: str  # folder or hub id
    tensors: dict[str, TensorRef]
    dtype: torch.dtype
    device: torch.device  # of this process


def load_shards(
    model_name_or_path: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    load_in_4bit: bool,
    device: torch.device,
) -> PreTrainedModel:
    """The model that `load_base` loads, with its weights partitioned by ZeRO-3; collective.

    Args:
        dtype: of the weights, and of the storage of 4-bit ones: DeepSpeed gathers tensors of one dtype together.
        device: of this process.

    Raises:
        UserError: weights that are missing, not finite, or do not fit the config.
    """
    check_links(model_name_or_path)
    stored = stored_quantization(model_name_or_path)
    config = copy.deepcopy(config)
    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM._model_mapping[type(config)](config)
    tensors = model_tensors(model_name_or_path) if stored else base_tensors(model_name_or_path, model)
    quantizer = None
    if stored or load_in_4bit:
        own = BitsAndBytesConfig(**{**stored, "bnb_4bit_compute_dtype": dtype}) if stored else None
        quantizer = AutoHfQuantizer.from_config(own or training_quantization(dtype, dtype), pre_quantized=bool(stored))
        quantizer.preprocess_model(model, dtype=dtype, device_map={"": device})
    tied = tied_names(model)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    missing = [name for name, _ in model.named_parameters() if name not in tensors]
    if missing:
        raise lacking(model_name_or_path, missing)
    _fill(model, _Base(model_name_or_path, tensors, dtype, device))
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    model.generation_config = read_generation_config(model_name_or_path) or model.generation_config
    disable_cpu_repacking(model)
    forget_lengths(model)
    return model.eval()


def _fill(model: PreTrainedModel, base: _Base) -> None:
    """Load and partition all parameters of `model`, which are on the meta device."""
    from deepspeed.runtime.zero.partition_parameters import Init  # a second's import, for ZeRO-3 alone

    filled: dict[int, nn.Parameter] = {}  # by the id of the empty one: tied weights are one parameter
    turn, empty = 0, list(model.parameters())  # kept: ids of deleted objects return
    for path, unit in tqdm(list(_units(model)), desc="Loading shards", disable=dist.get_rank() > 0):
        for name, module in unit.named_modules():
            prefix = ".".join(part for part in (path, name) if part)
            for own, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in filled:
                    reader, turn = turn % dist.get_world_size(), turn + 1
                    filled[id(parameter)] = _shared(f"{prefix}.{own}", parameter, module, reader, base)
                module._parameters[own] = filled[id(parameter)]
        Init(module=unit, config_dict_or_path=deepspeed_config())
    assert all(id(parameter) in filled for parameter in empty)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(base.device)


def _units(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """(path, module): the decoder layers, and outside of them each module with parameters of its own."""
    layers = {id(layer) for layer in model.get_decoder().layers}
    inside = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        if id(module) in layers:
            inside = f"{path}."
            yield path, module
        elif any(True for _ in module.parameters(recurse=False)):
            yield path, module


def _shared(name: str, parameter: nn.Parameter, module: nn.Module, reader: int, base: _Base) -> nn.Parameter:
    """The parameter `name`, whole: process `reader` reads it, all get it."""
    values: Tensor | None = None
    sent: list[Any] = [None]
    if dist.get_rank() == reader:
        try:
            values, scales = _read(name, parameter, base)
            sent = [(values.shape, scales)]
        except UserError as error:
            sent = [error]  # for all processes: the others would wait for ever
    dist.broadcast_object_list(sent, src=reader, device=base.device)
    if isinstance(sent[0], UserError):
        raise sent[0]
    shape, scales = sent[0]
    values = torch.empty(shape, dtype=base.dtype, device=base.device) if values is None else values
    dist.broadcast(values.view(torch.uint8), src=reader)  # bytes: a cast may change those that are NaN in 16 bits
    if scales is None:
        return nn.Parameter(values, requires_grad=False)
    return bnb.nn.Params4bit.from_prequantized(values, scales, device=base.device, module=module)


def _read(name: str, parameter: nn.Parameter, base: _Base) -> tuple[Tensor, dict[str, Any] | None]:
    """(values, None), or (4-bit values, the state of their blocks), on this process's device."""
    prefix = f"{name}."
    stored = {key.removeprefix(prefix): ref.read() for key, ref in base.tensors.items() if key.startswith(prefix)}
    if stored:
        return base.tensors[name].read().flatten().view(base.dtype).view(-1, 1).to(base.device), stored
    values = base.tensors[name].read().to(base.dtype)
    if not is_finite(values):
        raise not_finite(base.source, name, base.dtype)
    values = values.to(base.device).contiguous()
    if not isinstance(parameter, bnb.nn.Params4bit):
        return values, None
    options = {key: getattr(parameter, key) for key in ("compress_statistics", "quant_type", "quant_storage")}
    quantized = bnb.nn.Params4bit(values, requires_grad=False, **options).to(base.device)
    return quantized.data, {key: part.cpu() for key, part in quantized.quant_state.as_dict(packed=True).items()}
