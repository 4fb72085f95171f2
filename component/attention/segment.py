"""Where do attention kernels read their inputs and write their results? In views, under one autograd node.

A group of tokens in some heads is a strided view of query, key and value, of the output, and of each gradient, so no
input is copied. With plain autograd, the gradient of each view would be a zero-filled tensor of the full input's size.

If a row is split over processes, a group may begin left of this process's tokens. Its attention is then computed in
two calls, over the keys here and over those from the left (component/attention/exchange.py), and merged.

Shapes: B rows, T tokens, H query heads, Hkv key/value heads, D head size.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from component.attention import kernel
from component.attention.exchange import Exchange, FetchedKeys

# More segments than this, shorter than this on average, go to one call of the variable-length kernel: launch overhead
# and kernels too small for the GPU would dominate otherwise
VARLEN_SEGMENTS, VARLEN_TOKENS = 8, 4096

Inputs = tuple[Tensor, Tensor, Tensor]  # query, key, value


class Segment(NamedTuple):
    """Consecutive groups of tokens in one row and some of its heads; each group attends causally to itself."""

    row: int
    heads: slice
    kv_heads: slice
    start: int  # of the first group, in tokens
    lengths: tuple[int, ...]  # of the groups, in tokens; all equal, except for the varlen kernel
    left: int = 0  # tokens of its only group that other processes hold
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

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> Inputs:
        return self.view(query, self.heads), self.view(key, self.kv_heads), self.view(value, self.kv_heads)

    def left_inputs(self, query: Tensor, left: Tensor) -> Inputs:
        """The query here, and key and value (1, heads, tokens, D) in what the exchange of its heads fetched."""
        key, value = left[:, self.row : self.row + 1, :, -self.left :]
        return self.view(query, self.heads), key, value


class HeadCall(NamedTuple):
    """The segments of some heads, which cover all tokens of all rows."""

    rows: list[list[Segment]]
    exchange: Exchange | None = None  # of the keys and values of these heads that other processes hold

    @property
    def segments(self) -> list[Segment]:
        return [segment for row in self.rows for segment in row]


def assign_kernels(segments: list[Segment], query: Tensor, key: Tensor, value: Tensor) -> list[Segment]:
    """`segments`, which cover some heads of a row, with their kernels; many short ones become one varlen segment."""
    cut = [segment for segment in segments if segment.left]
    whole = [segment for segment in segments if not segment.left]
    lengths = tuple(length for segment in whole for length in segment.lengths)
    if len(whole) > VARLEN_SEGMENTS and sum(lengths) < VARLEN_TOKENS * len(whole):
        varlen = whole[0]._replace(lengths=lengths, kernel=kernel.VARLEN)
        if kernel.supports_varlen(*varlen.inputs(query, key, value)):
            whole = [varlen]

    def assigned(segment: Segment) -> Segment:
        name = segment.kernel or kernel.select_kernel(*segment.inputs(query, key, value))
        return segment._replace(kernel=name)

    return [assigned(segment) for segment in [*cut, *whole]]


class SavedParts(NamedTuple):
    """What the backward of a segment needs besides inputs and output: of the keys here, and of those from the left."""

    own: kernel.SavedForBackward
    left: kernel.SavedForBackward | None


class SavedAttention:
    """The attention results of one layer in one forward pass, so that recomputing the layer runs no kernel again.

    Whoever recomputes a layer creates one per layer and pass, and gives it to both calls of the layer as the keyword
    argument `saved_attention`. It stays empty if no fused kernel runs; then attention is computed twice.
    """

    def __init__(self) -> None:
        self.out: Tensor | None = None  # (B, T, H, D)
        self.fetch: Callable[[], Tensor] | None = None  # `out`, if it is elsewhere until the second call
        self.parts: list[SavedParts] = []  # one per segment; mostly lse, 4 bytes per token and head
        self.calls: list[HeadCall] = []

    @property
    def is_filled(self) -> bool:
        return self.out is not None or self.fetch is not None

    def take(self) -> Tensor:
        """`out`, which is not held here any longer."""
        out = self.fetch() if self.out is None and self.fetch is not None else self.out
        self.out = self.fetch = None
        assert out is not None
        return out


def attend_segments(
    calls: list[HeadCall],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    dropout: float,
    saved_attention: SavedAttention | None = None,
) -> Tensor:
    """Attention inside each segment, (B, T, H, D): one autograd function if fused kernels are available, else SDPA.

    Args:
        calls: in the order of their heads.
        dropout: probability of dropping an attention weight; not supported by the fused path.
        saved_attention: filled if fused kernels run.
    """
    query, key, value = _to_autocast_dtype(query, key, value)
    if dropout == 0:
        inputs = (query, key, value)
        fused = [call._replace(rows=[assign_kernels(row, *inputs) for row in call.rows]) for call in calls]
        if all(segment.kernel for call in fused for segment in call.segments):
            return FusedAttention.apply(query, key, value, fused, scale, saved_attention)
    parts = []
    for call in calls:
        left = None
        if call.exchange is not None:
            key, value, left = FetchedKeys.apply(key, value, call.exchange)
        parts.append(_attend_by_sdpa(call, query, key, value, left, scale, dropout))
    return torch.cat(parts, dim=2)


def _attend_by_sdpa(call: HeadCall, query, key, value, left: Tensor | None, scale, dropout: float) -> Tensor:
    """(B, T, heads of `call`, D)."""

    def attend(segment: Segment) -> Tensor:  # (t, h, D)
        q, k, v = segment.inputs(query, key, value)
        if segment.left and left is not None:
            _, left_key, left_value = segment.left_inputs(query, left)
            k, v = torch.cat([left_key, k], dim=2), torch.cat([left_value, v], dim=2)
        return causal_sdpa(q, k, v, scale, dropout).transpose(1, 2).flatten(0, 1)

    return torch.stack([torch.cat([attend(segment) for segment in row]) for row in call.rows])


def attend_from_saved(query: Tensor, key: Tensor, value: Tensor, scale: float | None, saved: SavedAttention) -> Tensor:
    """The result of `attend_segments` for the same inputs, taken from `saved`: no forward kernel runs."""
    return FusedAttention.apply(*_to_autocast_dtype(query, key, value), saved.calls, scale, saved)


def _to_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast does for SDPA."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device_type)) for tensor in tensors)


class FusedAttention(torch.autograd.Function):
    """Query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D).

    Each token of each query head is in exactly one segment. What other processes hold is fetched for the heads of one
    call at a time, while the call before runs; again in the backward, so that none of it is kept.
    """

    @staticmethod
    def forward(ctx, query, key, value, calls: list[HeadCall], scale: float | None, memo: SavedAttention | None):
        if memo is not None and memo.is_filled:
            out, parts = memo.take().detach(), memo.parts
        else:
            out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
            parts = [
                _forward(segment, query, key, value, left, out, scale)
                for call, left in _with_left(calls, key, value)
                for segment in call.segments
            ]
            if memo is not None:
                memo.out, memo.parts, memo.calls = out.detach(), parts, calls
        saved = [part for both in parts for part in both if part is not None]
        ctx.calls, ctx.scale = calls, scale
        ctx.saved = [(part._replace(tensors=()), len(part.tensors)) for part in saved]
        ctx.save_for_backward(query, key, value, out, *(tensor for part in saved for tensor in part.tensors))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, *tensors = ctx.saved_tensors
        inputs, rest = (query, key, value), iter(tensors)
        saved = iter([part._replace(tensors=tuple(islice(rest, count))) for part, count in ctx.saved])
        # with a single key/value head, segments of different heads add to the same gradients
        shares_kv = any(segment.heads.start and not segment.kv_heads.start for segment in ctx.calls[-1].segments)
        new = torch.zeros_like if shares_kv else torch.empty_like
        grads = [torch.empty_like(query), new(key), new(value)]
        grad_out, returning = grad_out.contiguous(), None
        for call, left in _with_left(ctx.calls, key, value):
            grad_left = None if left is None else torch.zeros_like(left)
            for segment in call.segments:
                views = [segment.view(tensor.transpose(1, 2), segment.heads) for tensor in (grad_out, out)]
                _backward(segment, inputs, grads, views, next(saved), ctx.scale, shares_kv)
                if segment.left:
                    sides = segment.left_inputs(query, left), segment.left_inputs(grads[0], grad_left)
                    _left_backward(*sides, views, next(saved), ctx.scale)
            if returning is not None and call.exchange is not None:
                returning[0].add(returning[1], *grads[1:])
            if call.exchange is not None:
                returning = call.exchange, call.exchange.give_back(grad_left, key.shape[2])
        if returning is not None:
            returning[0].add(returning[1], *grads[1:])
        return *grads, None, None, None


def _with_left(calls: list[HeadCall], key: Tensor, value: Tensor) -> Iterator[tuple[HeadCall, Tensor | None]]:
    """Each call with the keys and values that it needs from the left; the next ones are on their way meanwhile."""
    exchanges = [call.exchange for call in calls if call.exchange is not None]
    fetches = (exchange.fetch(key, value) for exchange in exchanges)
    pending = next(fetches, None)
    for call in calls:
        left = None
        if call.exchange is not None and pending is not None:
            left = call.exchange.joined(pending)
            pending = next(fetches, None)
        yield call, left


def _forward(segment: Segment, query, key, value, left: Tensor | None, out, scale) -> SavedParts:
    """Write the output of `segment` into `out` (B, T, H, D)."""
    lengths = segment.lengths if segment.kernel == kernel.VARLEN else None
    views, place = segment.inputs(query, key, value), segment.view(out.transpose(1, 2), segment.heads)
    part, own = kernel.attention_forward(*views, scale, kernel=segment.kernel, lengths=lengths)
    place.copy_(part)
    if not segment.left:
        return SavedParts(own, None)
    more, other = kernel.attention_forward(*segment.left_inputs(query, left), scale, is_causal=False)
    kernel.merge_attention(place, own, more, other)
    return SavedParts(own, other)


def _backward(segment: Segment, inputs, grads, views, saved, scale, shares_kv: bool) -> None:
    """Write the gradients of `segment` into `grads`, shaped like `inputs`; `views`: of dL/d output and output."""
    query, key, value = segment.inputs(*inputs)
    parts = kernel.attention_backward(views[0], query, key, value, views[1], saved, scale)
    query, key, value = segment.inputs(*grads)
    query.copy_(parts[0])
    for grad, part in ((key, parts[1]), (value, parts[2])):
        grad.add_(part) if shares_kv else grad.copy_(part)


def _left_backward(inputs: Inputs, grads: Inputs, views, saved, scale) -> None:
    """Add the gradients of attention to keys from the left to `grads`, shaped like `inputs`."""
    query, key, value = inputs
    parts = kernel.attention_backward(views[0], query, key, value, views[1], saved, scale, is_causal=False)
    for grad, part in zip(grads, parts, strict=True):
        grad.add_(part)


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Causal attention by SDPA, (b, h, t, D), without repeating the keys and values of grouped-query models.

    With more keys than queries, the queries are the last tokens.
    """
    attend = F.scaled_dot_product_attention
    per_kv, left = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(left) if left else None
    options: dict[str, Any] = {"is_causal": mask is None, "attn_mask": mask, "scale": scale, "dropout_p": dropout}
    if per_kv == 1 or kernel.select_kernel(query, key, value) != kernel.EFFICIENT:
        return attend(query, key, value, enable_gqa=per_kv > 1, **options)
    # the memory-efficient kernel has no grouped-query support: one call per query head of a key/value head
    parts = query.unflatten(1, (key.shape[1], per_kv)).unbind(2)
    return torch.stack([attend(part, key, value, **options) for part in parts], dim=2).flatten(1, 2)
