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
from component.attention.kernel import describe_kernels as describe_kernels
from component.attention.kernel import limit_kernels as limit_kernels

# One call of the variable-length kernel in place of more runs than this, if they are shorter than that on average:
# launches, and kernels too small for the GPU, would take longer than computing
VARIED_RUNS, VARIED_TOKENS = 8, 4096


class Run(NamedTuple):
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
        groups = 1 if self.kernel == kernel.VARIED else len(self.lengths)
        length = sum(self.lengths) // groups
        start = tensor.storage_offset() + self.row * by_row + heads.start * by_head + self.start * by_token
        return tensor.as_strided(
            (groups, heads.stop - heads.start, length, tensor.shape[3]),
            (length * by_token, by_head, by_token, by_number),
            start,
        )

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.view(query, self.heads), self.view(key, self.kv_heads), self.view(value, self.kv_heads)


def with_kernels(runs: list[Run], query: Tensor, key: Tensor, value: Tensor) -> list[Run]:
    """The same `runs`, which make up some heads of a row, or one in place of them, with the kernel for each."""
    lengths = tuple(length for run in runs for length in run.lengths)
    if len(runs) > VARIED_RUNS and sum(lengths) < VARIED_TOKENS * len(runs):
        varied = runs[0]._replace(lengths=lengths, kernel=kernel.VARIED)
        if kernel.takes_varied_lengths(*varied.inputs(query, key, value)):
            return [varied]
    return [run._replace(kernel=kernel.choose(*run.inputs(query, key, value))) for run in runs]


class AttentionMemo:
    """What one layer's attention computed in one forward pass: recomputing the layer, kernels need not run again.

    Whoever drops a layer's activations makes one per layer and pass and gives it to both calls of the layer, as the
    keyword argument `attention_memo`. It stays empty where no fused kernel runs: then all is computed again.
    """

    def __init__(self) -> None:
        self.out: Tensor | None = None  # (B, T, H, D); may be moved to the host, and back before the second call
        self.residues: list[kernel.Residue] = []  # one per run: above all 4 bytes per token and head
        self.runs: list[Run] = []


class FusedAttention(torch.autograd.Function):
    """(B, H, T, D), (B, Hkv, T, D) twice -> (B, T, H, D), where each token of each query head is in one of the runs.

    Two runs with the same keys and values must be of different heads, and those of later heads come later.
    """

    @staticmethod
    def forward(ctx, query, key, value, runs: list[Run], scale: float | None, memo: AttentionMemo | None):
        if memo is not None and memo.out is not None:
            out, residues = memo.out.detach(), memo.residues
        else:
            out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
            residues = [_forward(run, query, key, value, out, scale) for run in runs]
            if memo is not None:
                memo.out, memo.residues, memo.runs = out.detach(), residues, runs
        ctx.runs, ctx.scale = runs, scale
        ctx.residues = [(residue._replace(tensors=()), len(residue.tensors)) for residue in residues]
        ctx.save_for_backward(query, key, value, out, *(tensor for residue in residues for tensor in residue.tensors))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, *tensors = ctx.saved_tensors
        inputs, rest = (query, key, value), iter(tensors)
        grads = [torch.empty_like(tensor) for tensor in inputs]
        grad_out = grad_out.contiguous()
        for run, (residue, count) in zip(ctx.runs, ctx.residues, strict=True):
            residue = residue._replace(tensors=tuple(islice(rest, count)))
            _backward(run, inputs, grads, grad_out, out, residue, ctx.scale)
        return *grads, None, None, None


def _forward(run: Run, query, key, value, out, scale) -> kernel.Residue:
    """Writes the output of `run` into `out` (B, T, H, D)."""
    lengths = run.lengths if run.kernel == kernel.VARIED else None
    views = run.inputs(query, key, value)
    part, residue = kernel.causal_forward(*views, scale, kernel=run.kernel, lengths=lengths)
    run.view(out.transpose(1, 2), run.heads).copy_(part)
    return residue


def _backward(run: Run, inputs, grads, grad_out, out, residue: kernel.Residue, scale) -> None:
    """Writes the gradients of `run` into `grads`, laid out as `inputs`; `grad_out` and `out` are (B, T, H, D)."""
    grad_out, out = (run.view(tensor.transpose(1, 2), run.heads) for tensor in (grad_out, out))
    query, key, value = run.inputs(*inputs)
    parts = kernel.causal_backward(grad_out, query, key, value, out, residue, scale)
    query, key, value = run.inputs(*grads)
    query.copy_(parts[0])
    shares_kv = run.heads.start > 0 and run.kv_heads.start == 0  # with earlier heads, whose runs have been here
    for grad, part in ((key, parts[1]), (value, parts[2])):
        grad.add_(part) if shares_kv else grad.copy_(part)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Causal attention by SDPA, (b, h, t, D): grouped heads without repeating keys and values where it can."""
    attend = F.scaled_dot_product_attention
    options: dict[str, Any] = {"is_causal": True, "scale": scale, "dropout_p": dropout}
    per_kv = query.shape[1] // key.shape[1]
    if per_kv == 1 or kernel.choose(query, key, value) != kernel.EFFICIENT:
        return attend(query, key, value, enable_gqa=per_kv > 1, **options)
    # The memory-efficient kernel knows no grouped heads: one call for each member of a group
    members = query.unflatten(1, (key.shape[1], per_kv)).unbind(2)
    return torch.stack([attend(member, key, value, **options) for member in members], dim=2).flatten(1, 2)
