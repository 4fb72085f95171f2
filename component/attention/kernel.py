"""Which kernel computes causal attention, forward and backward?

The one that PyTorch's scaled_dot_product_attention (SDPA) would take, called as SDPA calls it: the operators below
SDPA hand out what their backward needs, so that a caller can keep it, take strided views, and say where gradients go.

Shapes: b batch, h query heads, hk key/value heads (h is a multiple of hk), t tokens, D head size.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

CUDNN, FLASH, EFFICIENT, CPU_FLASH, VARLEN = "cuDNN", "flash", "memory-efficient", "CPU flash", "flash, varied lengths"
BACKENDS = {
    int(SDPBackend.CUDNN_ATTENTION): CUDNN,
    int(SDPBackend.FLASH_ATTENTION): FLASH,
    int(SDPBackend.EFFICIENT_ATTENTION): EFFICIENT,
}
GROUPED = {CUDNN, FLASH, CPU_FLASH}  # take fewer key/value heads than query heads
CUDNN_TOKENS = 128  # cuDNN compiles anew for each length: it gets multiples of this, flash gets the odd remainders

aten: Any = torch.ops.aten


class SavedForBackward(NamedTuple):
    """What the backward needs beside inputs and output; the first of `tensors` is the log-sum-exp."""

    kernel: str
    tensors: tuple[Tensor | None, ...]
    longest: int = 0  # sequence in tokens, of varied lengths


def select_kernel(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """The kernel for (b, h, t, D), (b, hk, t, D) twice; None: no fused one, SDPA alone can compute this."""
    if query.device.type not in ("cpu", "cuda") or not query.dtype == key.dtype == value.dtype:
        return None
    name = _sdpa_choice(query, key, value)
    if name is None and query.shape[1] > key.shape[1]:  # one call for each member of a group of heads?
        name = _sdpa_choice(query[:, :: query.shape[1] // key.shape[1]], key, value)
    if name == CUDNN and query.shape[2] % CUDNN_TOKENS and supports_varlen(query, key, value):
        return FLASH
    return None if name == FLASH and query.shape[3] % 8 else name  # SDPA pads such heads, the operator refuses them


def _sdpa_choice(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    try:
        choice = torch._fused_sdp_choice(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
    except RuntimeError:  # every kernel that could is switched off: SDPA will say so better
        return None
    name = BACKENDS.get(choice)
    return CPU_FLASH if name == FLASH and query.device.type == "cpu" else name


def supports_varlen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `causal_forward` takes `lengths` for tensors like these: CUDA's flash kernel does."""
    if not query.is_cuda or query.shape[3] % 8 or not query.dtype == key.dtype == value.dtype:
        return False
    return cuda.can_use_flash_attention(_params(query, key, value))


def _params(query: Tensor, key: Tensor, value: Tensor):
    return cuda.SDPAParams(query, key, value, None, 0.0, True, query.shape[1] != key.shape[1])


def causal_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    *,
    kernel: str | None = None,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, SavedForBackward]:
    """Causal attention: (b, h, t, D), (b, hk, t, D) twice -> (b, h, t, D) and what the backward needs.

    Args:
        kernel: as `choose` said; None to ask it here.
        lengths: in tokens, with sum t, of sequences behind each other that don't see one another; then b is 1.
    """
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(query.device)
        return _varlen_forward(query, key, value, cu_seqlens, max(lengths), scale)
    kernel = kernel or select_kernel(query, key, value)
    assert kernel is not None, "no fused kernel: ask choose() first"
    if query.shape[1] == key.shape[1] or kernel in GROUPED:
        out, tensors = _forward(kernel, query, key, value, scale)
        return out, SavedForBackward(kernel, tensors)
    parts = [_forward(kernel, member, key, value, scale) for member in _members(query, key)]
    out = torch.stack([out for out, _ in parts], dim=2).flatten(1, 2)
    return out, SavedForBackward(kernel, tuple(tensor for _, tensors in parts for tensor in tensors))


def causal_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    saved: SavedForBackward,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by query, key and value, shaped like them; `grad_out` and `out` are (b, h, t, D), D contiguous."""
    kernel, tensors, _ = saved
    if kernel == VARLEN:
        return _varlen_backward(grad_out, query, key, value, out, saved, scale)
    if query.shape[1] == key.shape[1] or kernel in GROUPED:
        return _backward(kernel, grad_out, query, key, value, out, tensors, scale)
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    members = zip(*(_members(tensor, key) for tensor in (grad_query, grad_out, query, out)), strict=True)
    for i, (dq, grad, q, o) in enumerate(members):
        parts = _backward(kernel, grad, q, key, value, o, tensors[3 * i : 3 * i + 3], scale)
        dq.copy_(parts[0])
        grad_key += parts[1]
        grad_value += parts[2]
    return grad_query, grad_key, grad_value


def _members(tensor: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Views (b, hk, t, D): the first query head of each key/value head, the second of each ..."""
    return tensor.unflatten(1, (key.shape[1], -1)).unbind(2)


# The operators; which result is which argument of the backward is in PyTorch's tools/autograd/derivatives.yaml


def _forward(kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, tuple]:
    """The output and (log-sum-exp, state and offset of a random generator that nothing here uses)."""
    seed = offset = None
    if kernel == CUDNN:
        out, lse, *_, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=scale
        )
    elif kernel == FLASH:
        out, lse, *_, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, True, False, scale=scale
        )
    elif kernel == EFFICIENT:
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, True, scale=scale
        )
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return out, (lse, seed, offset)


def _backward(kernel, grad, q, k, v, out, tensors, scale) -> tuple[Tensor, Tensor, Tensor]:
    lse, seed, offset = tensors
    t = q.shape[2]
    if kernel == CUDNN:
        # PyTorch finds a compiled backward again by the strides of q, k and v alone: those of grad and out must follow
        # from them, or a call reads memory in the layout of an earlier one
        return aten._scaled_dot_product_cudnn_attention_backward(
            *(_laid_out_like(q, grad), q, k, v, _laid_out_like(q, out), lse),
            *(seed, offset, None, None, None, t, t, 0.0, True),
            scale=scale,
        )
    if kernel == FLASH:
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, t, t, 0.0, True, seed, offset, scale=scale
        )
    if kernel == EFFICIENT:
        out = out.transpose(1, 2).contiguous().transpose(1, 2)  # it takes tokens to be h * D apart, without a check
        wanted = (True, True, True, False)
        return aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, lse, seed, offset, 0.0, wanted, True, scale=scale
        )[:3]
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, True, scale=scale)


def _laid_out_like(like: Tensor, tensor: Tensor) -> Tensor:
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _varlen_forward(query, key, value, cu_seqlens, longest, scale) -> tuple[Tensor, SavedForBackward]:
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (t, h, D)
    options = (cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False)
    out, lse, seed, offset, _ = aten._flash_attention_forward(q, k, v, *options, scale=scale)
    return out.transpose(0, 1)[None], SavedForBackward(VARLEN, (lse, seed, offset, cu_seqlens), longest)


def _varlen_backward(grad_out, query, key, value, out, saved, scale) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (tensor[0].transpose(0, 1) for tensor in (grad_out, query, key, value, out))
    lse, seed, offset, cu_seqlens = saved.tensors
    options = (lse, cu_seqlens, cu_seqlens, saved.longest, saved.longest, 0.0, True, seed, offset)
    grads = aten._flash_attention_backward(*inputs, *options, scale=scale)
    dq, dk, dv = (grad.transpose(0, 1)[None] for grad in grads)
    return dq, dk, dv


def limit_kernels(use_flash_attn: bool | None) -> None:
    """Let SDPA choose among all kernels (None), flash and cuDNN alone (True), or all but those (False: a V100)."""
    if use_flash_attn is not None:
        torch.backends.cuda.enable_flash_sdp(use_flash_attn)
        torch.backends.cuda.enable_cudnn_sdp(use_flash_attn)
        torch.backends.cuda.enable_mem_efficient_sdp(not use_flash_attn)
        torch.backends.cuda.enable_math_sdp(not use_flash_attn)


def describe_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """The kernels that may run on `device` for `dtype`, the preferred one first; math is SDPA's unfused one."""
    probe = torch.empty(1, 1, CUDNN_TOKENS, 64, device=device, dtype=dtype)
    names = [select_kernel(probe, probe, probe)]  # asked first: PyTorch sets its order then, by the GPU
    if device.type == "cuda":
        params = _params(probe, probe, probe)
        can = {
            SDPBackend.CUDNN_ATTENTION: cuda.can_use_cudnn_attention(params),
            SDPBackend.FLASH_ATTENTION: cuda.can_use_flash_attention(params),
            SDPBackend.EFFICIENT_ATTENTION: cuda.can_use_efficient_attention(params),
        }
        order = _cur_sdpa_kernel_backends(with_priority=True)
        names = [BACKENDS[int(backend)] for backend in order if can.get(backend)]
    math = ["math"] if cuda.math_sdp_enabled() else []
    return "SDPA: " + ", ".join([name for name in names if name] + math)
