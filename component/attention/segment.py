"""Where do attention kernels read their inputs and write their results? In views, under one autograd node.

A group of tokens in some heads is a strided view of query, key and value, of the output, and of each gradient, so no
input is copied. With plain autograd, the gradient of each view would be a zero-filled tensor of the full input's size.

Shapes: B rows, T tokens, H query heads, Hkv key/value heads, D head size.
"""

from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from component.attention import kernel

# More segments than this, shorter than this on average, go to one call of the variable-length kernel: launch overhead
# and kernels too small for the GPU would dominate otherwise
VARLEN_SEGMENTS, VARLEN_TOKENS = 8, 4096


class Segment(NamedTuple):
    """Consecutive groups of tokens in one row and some of its heads; each group attends causally to itself."""

    row: int
    heads: slice
    kv_heads: slice
    start: int  # of the first group, in tokens
    lengths: tuple[int, ...]  # of the groups, in tokens; all equal, except for the varlen kernel
    kernel: str | None = None  # None: no fused kernel

    def view(self, tensor: Tensor, heads: slice) -> Tensor:
        """(B, n, T, D) -> (groups, heads, group length, D), or (1, heads, tokens, D) for the varlen kernel."""
        # one as_strided instead of four indexing calls: each layer makes dozens of views
        row_stride, head_stride, token_stride, last_stride = tensor.stride()
        groups = 1 if self.kernel == kernel.VARLEN else len(self.lengths)
        length = sum(self.lengths) // groups
        start = self.row * row_stride + heads.start * head_stride + self.start * token_stride
        return tensor.as_strided(
            (groups, heads.stop - heads.start, length, tensor.shape[3]),
            (length * token_stride, head_stride, token_stride, last_stride),
            tensor.storage_offset() + start,
        )

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.view(query, self.heads), self.view(key, self.kv_heads), self.view(value, self.kv_heads)


def assign_kernels(segments: list[Segment], query: Tensor, key: Tensor, value: Tensor) -> list[Segment]:
    """`segments`, which cover some heads of a row, with their kernels; many short ones become one varlen segment."""
    lengths = tuple(length for segment in segments for length in segment.lengths)
    if len(segments) > VARLEN_SEGMENTS and sum(lengths) < VARLEN_TOKENS * len(segments):
        varlen = segments[0]._replace(lengths=lengths, kernel=kernel.VARLEN)
        if kernel.supports_varlen(*varlen.inputs(query, key, value)):
            return [varlen]
    return [segment._replace(kernel=kernel.select_kernel(*segment.inputs(query, key, value))) for segment in segments]


class SavedAttention:
    """The attention results of one layer in one forward pass, so that recomputing the layer runs no kernel again.

    Whoever recomputes a layer creates one per layer and pass, and gives it to both calls of the layer as the keyword
    argument `saved_attention`. It stays empty if no fused kernel runs; then attention is computed twice.
    """

    def __init__(self) -> None:
        self.out: Tensor | None = None  # (B, T, H, D); may be offloaded until the second call
        self.saved_parts: list[kernel.SavedForBackward] = []  # one per segment; mostly lse, 4 bytes per token and head
        self.segments: list[Segment] = []


def attend_segments(
    rows: list[list[list[Segment]]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    dropout: float,
    saved_attention: SavedAttention | None = None,
) -> Tensor:
    """Attention inside each segment, (B, T, H, D): one autograd function if fused kernels are available, else SDPA.

    Args:
        rows: for each row, lists of segments; each list covers all tokens of some heads, in the order of the heads.
        dropout: probability of dropping an attention weight; not supported by the fused path.
        saved_attention: filled if fused kernels run.
    """
    query, key, value = _to_autocast_dtype(query, key, value)
    if dropout == 0:
        segments = [segment for row in rows for heads in row for segment in assign_kernels(heads, query, key, value)]
        if all(segment.kernel for segment in segments):
            return FusedAttention.apply(query, key, value, segments, scale, saved_attention)

    def attend(segment: Segment) -> Tensor:  # (t, h, D)
        return causal_sdpa(*segment.inputs(query, key, value), scale, dropout).transpose(1, 2).flatten(0, 1)

    return torch.stack([torch.cat([torch.cat(list(map(attend, heads))) for heads in row], dim=1) for row in rows])


def attend_from_saved(query: Tensor, key: Tensor, value: Tensor, scale: float | None, saved: SavedAttention) -> Tensor:
    """The result of `attend_segments` for the same inputs, taken from `saved`: no forward kernel runs."""
    return FusedAttention.apply(*_to_autocast_dtype(query, key, value), saved.segments, scale, saved)


def _to_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast does for SDPA."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device_type)) for tensor in tensors)


class FusedAttention(torch.autograd.Function):
    """Query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D).

    Each token of each query head is in exactly one segment. Segments that share keys and values must belong to
    different heads, and are ordered by heads.
    """

    @staticmethod
    def forward(ctx, query, key, value, segments: list[Segment], scale: float | None, memo: SavedAttention | None):
        if memo is not None and memo.out is not None:
            out, saved_parts = memo.out.detach(), memo.saved_parts
        else:
            out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
            saved_parts = [_forward(segment, query, key, value, out, scale) for segment in segments]
            if memo is not None:
                memo.out, memo.saved_parts, memo.segments = out.detach(), saved_parts, segments
        ctx.segments, ctx.scale = segments, scale
        ctx.saved_parts = [(saved._replace(tensors=()), len(saved.tensors)) for saved in saved_parts]
        ctx.save_for_backward(query, key, value, out, *(tensor for saved in saved_parts for tensor in saved.tensors))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, *tensors = ctx.saved_tensors
        inputs, rest = (query, key, value), iter(tensors)
        grads = [torch.empty_like(tensor) for tensor in inputs]
        grad_out = grad_out.contiguous()
        for segment, (saved, count) in zip(ctx.segments, ctx.saved_parts, strict=True):
            saved = saved._replace(tensors=tuple(islice(rest, count)))
            _backward(segment, inputs, grads, grad_out, out, saved, ctx.scale)
        return *grads, None, None, None


def _forward(segment: Segment, query, key, value, out, scale) -> kernel.SavedForBackward:
    """Write the output of `segment` into `out` (B, T, H, D)."""
    lengths = segment.lengths if segment.kernel == kernel.VARLEN else None
    views = segment.inputs(query, key, value)
    part, saved = kernel.causal_forward(*views, scale, kernel=segment.kernel, lengths=lengths)
    segment.view(out.transpose(1, 2), segment.heads).copy_(part)
    return saved


def _backward(segment: Segment, inputs, grads, grad_out, out, saved: kernel.SavedForBackward, scale) -> None:
    """Write the gradients of `segment` into `grads`, shaped like `inputs`; `grad_out` and `out` are (B, T, H, D)."""
    grad_out, out = (segment.view(tensor.transpose(1, 2), segment.heads) for tensor in (grad_out, out))
    query, key, value = segment.inputs(*inputs)
    parts = kernel.causal_backward(grad_out, query, key, value, out, saved, scale)
    query, key, value = segment.inputs(*grads)
    query.copy_(parts[0])
    # with a single key/value head: the segments of the first heads have written their share already
    shares_kv = segment.heads.start > 0 and segment.kv_heads.start == 0
    for grad, part in ((key, parts[1]), (value, parts[2])):
        grad.add_(part) if shares_kv else grad.copy_(part)


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Causal attention by SDPA, (b, h, t, D), without repeating the keys and values of grouped-query models."""
    attend = F.scaled_dot_product_attention
    options: dict[str, Any] = {"is_causal": True, "scale": scale, "dropout_p": dropout}
    per_kv = query.shape[1] // key.shape[1]
    if per_kv == 1 or kernel.select_kernel(query, key, value) != kernel.EFFICIENT:
        return attend(query, key, value, enable_gqa=per_kv > 1, **options)
    # the memory-efficient kernel has no grouped-query support: one call per query head of a key/value head
    parts = query.unflatten(1, (key.shape[1], per_kv)).unbind(2)
    return torch.stack([attend(part, key, value, **options) for part in parts], dim=2).flatten(1, 2)
