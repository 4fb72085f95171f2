"""Which SDPA kernel computes attention, forward and backward?

The kernel that PyTorch's scaled_dot_product_attention (SDPA) would select. The operators below SDPA are called
directly, because they return what their backward needs: callers can keep that, pass strided views, and choose where
gradients are written.

Shapes: b batch, h query heads, hk key/value heads (h is a multiple of hk), t tokens, D head size.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

CUDNN, FLASH, EFFICIENT, CPU_FLASH, VARLEN = "cuDNN", "flash", "memory-efficient", "CPU flash", "flash varlen"
BACKENDS = {
    int(SDPBackend.CUDNN_ATTENTION): CUDNN,
    int(SDPBackend.FLASH_ATTENTION): FLASH,
    int(SDPBackend.EFFICIENT_ATTENTION): EFFICIENT,
}
GROUPED = {CUDNN, FLASH, CPU_FLASH}  # support grouped-query attention
CUDNN_TOKENS = 128  # cuDNN compiles once per length: only multiples of this go to cuDNN, other lengths to flash

aten: Any = torch.ops.aten


class SavedForBackward(NamedTuple):
    """What the backward needs besides inputs and output; the first of `tensors` is the log-sum-exp."""

    kernel: str
    tensors: tuple[Tensor | None, ...]
    longest: int = 0  # sequence in tokens, for the varlen kernel


def select_kernel(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = True) -> str | None:
    """The fused kernel for query (b, h, t, D), key and value (b, hk, s, D); None if only SDPA itself can do it.

    Causal attention needs s = t.
    """
    if query.device.type not in ("cpu", "cuda") or not query.dtype == key.dtype == value.dtype:
        return None
    name = _sdpa_choice(query, key, value, is_causal)
    if name is None and query.shape[1] > key.shape[1]:  # without grouped-query support
        name = _sdpa_choice(query[:, :: query.shape[1] // key.shape[1]], key, value, is_causal)
    is_odd = query.shape[2] % CUDNN_TOKENS or key.shape[2] % CUDNN_TOKENS
    if name == CUDNN and is_odd and supports_varlen(query, key, value):
        return FLASH
    return None if name == FLASH and query.shape[3] % 8 else name  # SDPA pads these, its operator rejects them


def _sdpa_choice(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> str | None:
    options = {"is_causal": is_causal, "enable_gqa": query.shape[1] != key.shape[1]}
    try:
        choice = torch._fused_sdp_choice(query, key, value, **options)
    except RuntimeError:  # all suitable kernels are disabled; SDPA raises a clearer error
        return None
    name = BACKENDS.get(choice)
    return CPU_FLASH if name == FLASH and query.device.type == "cpu" else name


def supports_varlen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention_forward` accepts `lengths` for such tensors: only CUDA's flash kernel does."""
    if not query.is_cuda or query.shape[3] % 8 or not query.dtype == key.dtype == value.dtype:
        return False
    return cuda.can_use_flash_attention(_params(query, key, value))


def _params(query: Tensor, key: Tensor, value: Tensor):
    return cuda.SDPAParams(query, key, value, None, 0.0, True, query.shape[1] != key.shape[1])


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    *,
    kernel: str | None = None,
    lengths: Sequence[int] | None = None,
    is_causal: bool = True,
) -> tuple[Tensor, SavedForBackward]:
    """Attention: query (b, h, t, D), key and value (b, hk, s, D) -> (b, h, t, D) and what the backward needs.

    Args:
        kernel: from `select_kernel`; None to select it here.
        lengths: in tokens, with sum t, of concatenated sequences that don't attend to each other; then b is 1.
        is_causal: each token attends to itself and to earlier ones, s = t; False: to all s keys.
    """
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(query.device)
        return _varlen_forward(query, key, value, cu_seqlens, max(lengths), scale)
    kernel = kernel or select_kernel(query, key, value, is_causal)
    assert kernel is not None, "no fused kernel: call select_kernel() first"
    if query.shape[1] == key.shape[1] or kernel in GROUPED:
        out, tensors = _forward(kernel, query, key, value, scale, is_causal)
        return out, SavedForBackward(kernel, tensors)
    parts = [_forward(kernel, part, key, value, scale, is_causal) for part in _per_kv_head(query, key)]
    out = torch.stack([out for out, _ in parts], dim=2).flatten(1, 2)
    return out, SavedForBackward(kernel, tuple(tensor for _, tensors in parts for tensor in tensors))


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    saved: SavedForBackward,
    scale: float | None,
    is_causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped like them; `grad_out` and `out` are (b, h, t, D), D contiguous."""
    kernel, tensors, _ = saved
    if kernel == VARLEN:
        return _varlen_backward(grad_out, query, key, value, out, saved, scale)
    if query.shape[1] == key.shape[1] or kernel in GROUPED:
        return _backward(kernel, grad_out, query, key, value, out, tensors, scale, is_causal)
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    per_kv_head = zip(*(_per_kv_head(tensor, key) for tensor in (grad_query, grad_out, query, out)), strict=True)
    for i, (dq, grad, q, o) in enumerate(per_kv_head):
        parts = _backward(kernel, grad, q, key, value, o, tensors[3 * i : 3 * i + 3], scale, is_causal)
        dq.copy_(parts[0])
        grad_key += parts[1]
        grad_value += parts[2]
    return grad_query, grad_key, grad_value


def _per_kv_head(tensor: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Views (b, hk, t, D): the first query head of each key/value head, then the second of each, ..."""
    return tensor.unflatten(1, (key.shape[1], -1)).unbind(2)


def merge_attention(out: Tensor, saved: SavedForBackward, more: Tensor, more_saved: SavedForBackward) -> None:
    """Make `out` and both log-sum-exps those of attention over the keys of two calls with the same queries.

    The softmax over both sets of keys weighs each call's output by its share of the sum of exponentials. A backward
    call on either set, given the merged output and log-sum-exp, returns the gradients of the whole.

    Args:
        out: (b, h, t, D) of the first call, overwritten; `more`: of the second.
    """
    lse, more_lse = (_lse_views(part, out.shape[2]) for part in (saved, more_saved))
    first, second = (torch.stack(views, dim=2).flatten(1, 2) for views in (lse, more_lse))  # (b, h, t)
    total = torch.logaddexp(first, second)
    shares = [(part - total).exp().unsqueeze(-1) for part in (first, second)]
    out.copy_(out.to(total.dtype) * shares[0] + more.to(total.dtype) * shares[1])
    for views in (lse, more_lse):
        for view, part in zip(views, total.unflatten(1, (-1, len(views))).unbind(2), strict=True):
            view.copy_(part)


def _lse_views(saved: SavedForBackward, tokens: int) -> list[Tensor]:
    """The log-sum-exp, (b, h, t), or one (b, hk, t) for each call as in `_per_kv_head`."""
    # cuDNN's is (b, h, t, 1), and the memory-efficient kernel pads t to a multiple of 32
    tensors = [tensor for tensor in saved.tensors[::3] if tensor is not None]
    return [(tensor[..., 0] if tensor.dim() == 4 else tensor)[..., :tokens] for tensor in tensors]


# The operators. PyTorch's tools/autograd/derivatives.yaml maps their results to the arguments of their backward.


def _forward(kernel: str, q: Tensor, k: Tensor, v: Tensor, scale, is_causal: bool) -> tuple[Tensor, tuple]:
    """The output and (log-sum-exp, RNG seed, RNG offset); there is no dropout, so the latter two are unused."""
    seed = offset = None
    if kernel == CUDNN:
        out, lse, *_, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, is_causal, False, scale=scale
        )
    elif kernel == FLASH:
        out, lse, *_, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, is_causal, False, scale=scale
        )
    elif kernel == EFFICIENT:
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, is_causal, scale=scale
        )
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    return out, (lse, seed, offset)


def _backward(kernel, grad, q, k, v, out, tensors, scale, is_causal) -> tuple[Tensor, Tensor, Tensor]:
    lse, seed, offset = tensors
    queries, keys = q.shape[2], k.shape[2]
    if kernel == CUDNN:
        # PyTorch caches the compiled backward by the strides of q, k and v alone: grad and out must have q's layout,
        # or they are read in the layout of an earlier call
        return aten._scaled_dot_product_cudnn_attention_backward(
            *(_with_strides_of(q, grad), q, k, v, _with_strides_of(q, out), lse),
            *(seed, offset, None, None, None, queries, keys, 0.0, is_causal),
            scale=scale,
        )
    if kernel == FLASH:
        return aten._scaled_dot_product_flash_attention_backward(
            *(grad, q, k, v, out, lse, None, None, queries, keys, 0.0, is_causal, seed, offset), scale=scale
        )
    if kernel == EFFICIENT:
        out = out.transpose(1, 2).contiguous().transpose(1, 2)  # the operator assumes a token stride of h * D
        needs_grad = (True, True, True, False)
        return aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, lse, seed, offset, 0.0, needs_grad, is_causal, scale=scale
        )[:3]
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, q, k, v, out, lse, 0.0, is_causal, scale=scale)


def _with_strides_of(like: Tensor, tensor: Tensor) -> Tensor:
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
    """Let SDPA select from all kernels (None), only flash and cuDNN (True), or all but those (False; as on a V100)."""
    if use_flash_attn is not None:
        torch.backends.cuda.enable_flash_sdp(use_flash_attn)
        torch.backends.cuda.enable_cudnn_sdp(use_flash_attn)
        torch.backends.cuda.enable_mem_efficient_sdp(not use_flash_attn)
        torch.backends.cuda.enable_math_sdp(not use_flash_attn)


def describe_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """The SDPA kernels available on `device` for `dtype`, in order of preference; math is the unfused one."""
    probe = torch.empty(1, 1, CUDNN_TOKENS, 64, device=device, dtype=dtype)
    names = [select_kernel(probe, probe, probe)]  # also makes PyTorch set its priority order for this GPU
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
