"""What is kept, recomputed or moved to the host?

A `MemoryPlan` (component/memory/plan.py) put into a model: LoRA in few passes, decoder layers that keep what the plan
says, the loss in chunks, fused kernels. And the cap on GPU memory, and losses of whole windows for evaluation.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from component.distributed.strategy import Strategy
from component.loss import use_chunked_loss
from component.memory.layer import LeanLayer, lean_layers
from component.memory.linear import fuse_lora
from component.memory.offload import ActivationOffloader
from component.memory.plan import MemoryPlan

ALONE = Strategy()


def use_memory_plan(model: nn.Module, plan: MemoryPlan, *, fused: bool, strategy: Strategy = ALONE) -> str | None:
    """Make `model`, PEFT's wrapper around a causal language model, train as `plan` says; evaluation stays as it is.

    Args:
        fused: use Liger's kernels; see `liger_runs`.
        strategy: how training is distributed.

    Returns:
        None, or why Hugging Face's own layers stay: the caller may checkpoint those.
    """
    if strategy.shards_weights:
        return f"{strategy} gathers each weight through its module's own forward"
    base = model.get_base_model()
    fuse_lora(model)
    use_chunked_loss(base, plan.loss_chunk_tokens)
    layers = lean_layers(base)
    if fused:
        _use_liger_kernels(base, layers)
    if not layers:
        return f"the decoder layers of {type(base).__name__} are not among those that a plan is written for"
    stack = ActivationOffloader(plan.fetch_ahead) if plan.offload_activations else None
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
