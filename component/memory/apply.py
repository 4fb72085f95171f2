"""How is a memory plan applied to a model?

LoRA in fewer passes, decoder layers that save what the plan says (component/memory/layer.py), the loss in chunks, and
Liger's kernels.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from component.distributed.strategy import Strategy
from component.loss import use_chunked_loss
from component.memory.layer import LeanLayer, lean_layers
from component.memory.linear import LoRALinear, fuse_lora, use_float8
from component.memory.offload import ActivationOffloader
from component.memory.plan import MemoryPlan
from component.memory.shared_input import join_attention_inputs

ONE_PROCESS = Strategy()


def use_memory_plan(
    model: nn.Module,
    plan: MemoryPlan,
    *,
    fused: bool,
    strategy: Strategy = ONE_PROCESS,
    in_float8: bool = False,
    float8_forward: bool = True,
) -> str | None:
    """Make `model`, a PEFT-wrapped causal language model, train as `plan` says; evaluation is unchanged.

    Args:
        fused: use Liger's kernels; see `liger_runs`.
        strategy: how training is distributed.
        in_float8: compute products with frozen weights in FP8, on decoder layers that memory plans support.
        float8_forward: with `in_float8`, also those of the forward pass, not only gradients of activations.

    Returns:
        None, or the reason why Hugging Face's own layers stay; the caller may enable checkpointing for those.
    """
    base = model.get_base_model()
    use_chunked_loss(base, plan.loss_chunk_tokens)
    layers = lean_layers(base)
    if layers or not strategy.shards_weights:  # else each linear layer must be called, which gathers its weight
        fuse_lora(model)
    if fused:
        _use_liger_kernels(base, layers)
    if not layers:
        return f"memory plans do not support the decoder layers of {type(base).__name__}"
    if in_float8:
        use_float8(base.get_decoder(), forward=float8_forward)
        for layer in layers:
            layer.fused_mlp.use_float8(forward=float8_forward)
    join_attention_inputs(base)
    if strategy.shards_weights:
        _gather_whole_layers(base, layers)
    offloader = ActivationOffloader(plan.fetch_ahead) if plan.offload_activations else None
    for layer, level in zip(layers, plan.levels(len(layers)), strict=True):
        layer.level, layer.offloader, layer.tile = level, offloader, plan.mlp_tile_tokens
        layer.keeps_attention_output = plan.keep_attention_output
    if offloader is not None:
        base.get_decoder().register_forward_pre_hook(_clear_offloader)
    return None


def forget_unfinished(model: nn.Module) -> None:
    """After a pass over `model` that failed, or did not really run: drop what its layers hold for the rest of it."""
    for layer in model.modules():
        if isinstance(layer, LeanLayer) and layer.offloader is not None:
            layer.offloader.forget()
        if isinstance(projection := getattr(layer, "projection", None), LoRALinear) and projection.calls is not None:
            projection.calls.forget()


def _gather_whole_layers(base: PreTrainedModel, layers: list[LeanLayer]) -> None:
    """Make ZeRO-3 gather all weights of a layer before its forward and its backward pass, and free them after it.

    A layer calls few of its modules, and DeepSpeed would gather the weights of those alone.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers:
        set_z3_leaf_module(layer, True)
    # DeepSpeed takes a layer's gradients when that of its input is there, so the first layer's input needs one too
    base.enable_input_require_grads()


def _clear_offloader(decoder: nn.Module, *_) -> None:
    decoder.layers[0].offloader.clear()  # shared by all layers; looked up here, since a copied model has its own


def liger_runs() -> bool:
    """Whether Liger's Triton kernels can be used: they need an Ampere or newer GPU."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError:
        return False
    return True


def _use_liger_kernels(base: PreTrainedModel, layers: list[LeanLayer]) -> None:
    """Replace the model's norms and rotary embedding by Liger's, and SwiGLU in layers under a memory plan."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(
        base, rope=True, rms_norm=True, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=False
    )
    if base.config.hidden_act in ("silu", "swish"):
        for layer in layers:
            layer.fused_mlp.activate = LigerSiLUMulFunction.apply
