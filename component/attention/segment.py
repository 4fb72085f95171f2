"""Where do the kernels read, and where do their results go? Attention on groups of tokens, without copies of inputs.

Groups of tokens of some heads are views of query, key and value, and of one output and one gradient for each of them.
Left to autograd, the gradient of each view would become a tensor as large as the whole input, zero elsewhere.

Shapes: B rows, T tokens, H query heads, Hkv key/value heads, D head size.
"""

from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from component.attention import kernel

# One call of the variable-length kernel in place of more segments than this, if shorter than that on average:
# launches, and kernels too small for the GPU, would take longer than computing
VARLEN_SEGMENTS, VARLEN_TOKENS = 8, 4096


class Segment(NamedTuple):
    """Groups of tokens behind each other in one row, in some of its heads; each group attends causally to itself."""

    row: int
    heads: slice
    kv_heads: slice
    start: int  # of the first group, in tokens
    lengths: tuple[int, ...]  # of the groups, in tokens
    kernel: str | None = None  # None: no fused one

    def view(self, tensor: Tensor, heads: slice) -> Tensor:
        """(B, n, T, D) -> (groups, heads, length of a group, D); groups of varied lengths are left as one."""
        # one call in place of four that would say the same: there are dozens of views per layer
        by_row, by_head, by_token, by_number = tensor.stride()
        groups = 1 if self.kernel == kernel.VARLEN else len(self.lengths)
        length = sum(self.lengths) // groups
        start = tensor.storage_offset() + self.row * by_row + heads.start * by_head + self.start * by_token
        return tensor.as_strided(
            (groups, heads.stop - heads.start, length, tensor.shape[3]),
            (length * by_token, by_head, by_token, by_number),
            start,
        )

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.view(query, self.heads), self.view(key, self.kv_heads), self.view(value, self.kv_heads)


def with_kernels(segments: list[Segment], query: Tensor, key: Tensor, value: Tensor) -> list[Segment]:
    """`segments`, which make up some heads of a row, or one in place of them, with the kernel for each."""
    lengths = tuple(length for segment in segments for length in segment.lengths)
    if len(segments) > VARLEN_SEGMENTS and sum(lengths) < VARLEN_TOKENS * len(segments):
        varied = segments[0]._replace(lengths=lengths, kernel=kernel.VARLEN)
        if kernel.supports_varlen(*varied.inputs(query, key, value)):
            return [varied]
    return [segment._replace(kernel=kernel.select_kernel(*segment.inputs(query, key, value))) for segment in segments]


class SavedAttention:
    """What one layer's attention computed in one forward pass: recomputing the layer, kernels need not run again.

    Whoever drops a layer's activations makes one per layer and pass and gives it to both calls of the layer, as the
    keyword argument `saved_attention`. It stays empty where no fused kernel runs: then all is computed again.
    """

    def __init__(self) -> None:
        self.out: Tensor | None = None  # (B, T, H, D); may be moved to the host, and back before the second call
        self.saved_parts: list[kernel.SavedForBackward] = []  # one per segment: above all 4 bytes per token and head
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
    """Attention inside each segment, (B, T, H, D): by one autograd function where fused kernels run, else by SDPA.

    Args:
        rows: of each row, lists of segments that hold some of its heads whole, in the order of the heads.
        dropout: probability of dropping an attention weight; the fused path has none.
        saved_attention: filled if fused kernels run.
    """
    query, key, value = _in_autocast_dtype(query, key, value)
    if dropout == 0:
        segments = [segment for row in rows for heads in row for segment in with_kernels(heads, query, key, value)]
        if all(segment.kernel for segment in segments):
            return FusedAttention.apply(query, key, value, segments, scale, saved_attention)

    def attend(segment: Segment) -> Tensor:  # (t, h, D)
        return causal_sdpa(*segment.inputs(query, key, value), scale, dropout).transpose(1, 2).flatten(0, 1)

    return torch.stack([torch.cat([torch.cat(list(map(attend, heads))) for heads in row], dim=1) for row in rows])


def attend_again(query: Tensor, key: Tensor, value: Tensor, scale: float | None, saved: SavedAttention) -> Tensor:
    """What `attend_segments` returned for the same inputs, from `saved`: no forward kernel runs."""
    return FusedAttention.apply(*_in_autocast_dtype(query, key, value), saved.segments, scale, saved)


def _in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast does for SDPA."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


class FusedAttention(torch.autograd.Function):
    """(B, H, T, D), (B, Hkv, T, D) twice -> (B, T, H, D), where each token of each query head is in one segment.

    Two segments with the same keys and values must be of different heads, and those of later heads come later.
    """

    @staticmethod
    def forward(ctx, query, key, value, segments: list[Segment], scale: float | None, kept: SavedAttention | None):
        if kept is not None and kept.out is not None:
            out, saved_parts = kept.out.detach(), kept.saved_parts
        else:
            out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
            saved_parts = [_forward(segment, query, key, value, out, scale) for segment in segments]
            if kept is not None:
                kept.out, kept.saved_parts, kept.segments = out.detach(), saved_parts, segments
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
    """Writes the output of `segment` into `out` (B, T, H, D)."""
    lengths = segment.lengths if segment.kernel == kernel.VARLEN else None
    views = segment.inputs(query, key, value)
    part, saved = kernel.causal_forward(*views, scale, kernel=segment.kernel, lengths=lengths)
    segment.view(out.transpose(1, 2), segment.heads).copy_(part)
    return saved


def _backward(segment: Segment, inputs, grads, grad_out, out, saved: kernel.SavedForBackward, scale) -> None:
    """Writes the gradients of `segment` into `grads`, laid out as `inputs`; `grad_out` and `out` are (B, T, H, D)."""
    grad_out, out = (segment.view(tensor.transpose(1, 2), segment.heads) for tensor in (grad_out, out))
    query, key, value = segment.inputs(*inputs)
    parts = kernel.causal_backward(grad_out, query, key, value, out, saved, scale)
    query, key, value = segment.inputs(*grads)
    query.copy_(parts[0])
    # with earlier heads, whose segments have been here
    shares_kv = segment.heads.start > 0 and segment.kv_heads.start == 0
    for grad, part in ((key, parts[1]), (value, parts[2])):
        grad.add_(part) if shares_kv else grad.copy_(part)


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Causal attention by SDPA, (b, h, t, D): grouped heads without repeating keys and values where it can."""
    attend = F.scaled_dot_product_attention
    options: dict[str, Any] = {"is_causal": True, "scale": scale, "dropout_p": dropout}
    per_kv = query.shape[1] // key.shape[1]
    if per_kv == 1 or kernel.select_kernel(query, key, value) != kernel.EFFICIENT:
        return attend(query, key, value, enable_gqa=per_kv > 1, **options)
    # The memory-efficient kernel knows no grouped heads: one call for each member of a group
    members = query.unflatten(1, (key.shape[1], per_kv)).unbind(2)
    return torch.stack([attend(member, key, value, **options) for member in members], dim=2).flatten(1, 2)
