"""What is kept, recomputed or moved to the host?

A `MemoryPlan` (component/memory/plan.py) put into a model: LoRA in few passes, decoder layers that keep what the plan
says, the loss in chunks, fused kernels. And the cap on GPU memory, and losses of whole windows for evaluation.
"""

import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from component.error import UserError, first_line
from component.loss import TOKENS_PER_CHUNK, lean_loss
from component.memory.layer import LeanLayer, lean_layers
from component.memory.linear import fuse_lora
from component.memory.offload import HostStack
from component.memory.plan import MemoryPlan, estimate, next_lever
from component.memory.workload import Workload, paged_bytes

CONTEXT_GIB = 0.6  # CUDA's own, which `mem_get_info` already leaves out
LIBRARIES_GIB = 1.2  # NCCL's buffers, cuDNN's and Triton's kernels: outside of PyTorch's allocator
USABLE = 0.98  # of a budget: estimates are that good
HOST_SHARE = 0.8  # of the host memory that is free: pinned memory cannot be swapped out


def use_memory_plan(model: nn.Module, plan: MemoryPlan, *, fused: bool) -> str | None:
    """Make `model`, PEFT's wrapper around a causal language model, train as `plan` says; evaluation stays as it is.

    Args:
        fused: use Liger's kernels; see `liger_runs`.

    Returns:
        None, or why Hugging Face's own layers stay: the caller may checkpoint those.
    """
    base = model.get_base_model()
    if any(hasattr(parameter, "ds_id") for parameter in base.parameters()):
        return "ZeRO-3 gathers each weight through its module's own forward"
    fuse_lora(model)
    lean_loss(base, plan.loss_chunk_tokens)
    layers = lean_layers(base)
    if fused:
        _use_liger_kernels(base, layers)
    if not layers:
        return f"the decoder layers of {type(base).__name__} are not among those that a plan is written for"
    stack = HostStack(plan.fetch_ahead) if plan.offload_activations else None
    for layer, level in zip(layers, plan.levels(len(layers)), strict=True):
        layer.level, layer.stack, layer.tile = level, stack, plan.mlp_tile_tokens
        layer.keeps_attention_output = plan.keep_attention_output
    if stack is not None:
        base.get_decoder().register_forward_pre_hook(_clear_stack)
    return None


def _clear_stack(decoder: nn.Module, *_) -> None:
    decoder.layers[0].stack.clear()  # all layers have the same


def liger_runs() -> bool:
    """Whether Liger's kernels can be used: they are written in Triton, which wants Ampere or newer."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError:
        return False
    return True


def _use_liger_kernels(base: PreTrainedModel, layers: list[LeanLayer]) -> None:
    """Liger's norms and rotary embedding in place of the model's own, and SwiGLU for layers under a memory plan."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(
        base, rope=True, rms_norm=True, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=False
    )
    if base.config.hidden_act in ("silu", "swish"):
        for layer in layers:
            layer.second_half.activate = LigerSiLUMulFunction.apply


def room(work: Workload, budget_gib: float | None, device: torch.device) -> tuple[float, float]:
    """GiB that a plan may take of the GPU and of the host; infinite where there is no GPU to run out of.

    `budget_gib` caps PyTorch's allocator; what lies outside of it must find room on the card too.
    """
    if device.type != "cuda":
        return math.inf, math.inf
    outside = LIBRARIES_GIB + paged_bytes(work) / 2**30
    gpu = torch.cuda.mem_get_info(device)[0] / 2**30 - outside
    host = psutil.virtual_memory().available / 2**30
    return USABLE * min(gpu, budget_gib or math.inf), HOST_SHARE * host


@contextmanager
def explaining_out_of_memory(work: Workload, plan: MemoryPlan) -> Iterator[None]:
    """Say what to change when the GPU's memory does not suffice after all."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak = estimate(work, plan).peak_gib
        raise UserError(
            f"the GPU is out of memory ({first_line(error)}); the plan was estimated at {peak:.1f} GiB. "
            f"Next: {next_lever(work, plan)}"
        ) from error


def limit_memory(budget_gib: float | None) -> None:
    """Make the GPU as small as `budget_gib` GiB for this process: allocations beyond fail as on such a card.

    Raises:
        UserError: there is no GPU, or it is smaller than that.
    """
    if budget_gib is None:
        return
    if not torch.cuda.is_available():
        raise UserError(f"memory_budget_gib: {budget_gib} GiB, but there is no GPU whose memory it could limit")
    total = torch.cuda.mem_get_info()[1]
    if budget_gib * 2**30 > total:
        raise UserError(f"memory_budget_gib: {budget_gib} GiB, but this GPU has {total / 2**30:.1f}")
    torch.cuda.set_per_process_memory_fraction(budget_gib * 2**30 / total)


@torch.no_grad()
def next_token_losses(
    model: PreTrainedModel, input_ids: Tensor, chunk: int = TOKENS_PER_CHUNK, **inputs: Tensor
) -> Tensor:
    """Loss in nats of each token but the first, given those before it; logits exist for `chunk` tokens at a time.

    Args:
        model: a causal language model, PEFT's wrapper around it or not.
        input_ids: (B, T), T at least 2.
        inputs: attention_mask or position_ids, (B, T); the losses of padding mean nothing.

    Returns:
        (B, T - 1) in fp32; entry t is the loss of token t + 1.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.get_decoder()(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
    losses = [
        F.cross_entropy(_logits(base, part).transpose(1, 2), target, reduction="none")
        for part, target in zip(hidden[:, :-1].split(chunk, 1), input_ids[:, 1:].split(chunk, 1), strict=True)
    ]
    return torch.cat(losses, dim=1)


def chunked_logits(model: PreTrainedModel, input_ids: Tensor, chunk: int = TOKENS_PER_CHUNK) -> Iterator[Tensor]:
    """(B, T, V) in fp32 as parts (B, `chunk`, V), each to be forgotten before the next is made."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    yield from (_logits(base, part) for part in hidden.split(chunk, 1))


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(B, T, V) in fp32 from (B, T, hidden size), scaled and capped as some Llama relatives do."""
    config = model.config
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # Cohere; Granite
    logits = model.get_output_embeddings()(hidden).float().mul_(scale)
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else cap * torch.tanh(logits / cap)


_most_in_use = 0  # bytes of the whole card, the highest that note_device_memory saw


def note_device_memory() -> None:
    """Look at how much of the card is in use now, for `peak_memory`."""
    global _most_in_use
    free, total = torch.cuda.mem_get_info()
    _most_in_use = max(_most_in_use, total - free)


def peak_memory() -> dict[str, float]:
    """The most that this process took so far, in GiB: of the host's memory, and of the GPU's where there is one.

    Of the GPU: by tensors, held by PyTorch's allocator, and in use on the card, as far as `note_device_memory` was
    called. The last has all that no allocator of PyTorch's knows of: the CUDA context, libraries' own workspaces,
    bitsandbytes' paged optimizer states while they are on the card, and other processes.
    """
    peaks = {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # KiB on Linux
    if torch.cuda.is_available():
        note_device_memory()
        peaks |= {
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            "device_in_use_gib": _most_in_use / 2**30,
        }
    return {name: round(gib, 2) for name, gib in peaks.items()}
