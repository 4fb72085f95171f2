"""How is attention over whole rows computed if each process holds a part of the tokens? Ulysses, arXiv 2309.14509.

An all-to-all turns a part of the tokens with all heads into all tokens with a part of the heads; another turns the
result back. Every process then does an equal share of causal attention, which contiguous parts of the tokens would
not give.

Shapes: B rows, P processes, m = T/P tokens per process, H query heads, Hkv key/value heads, D head size.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from component.distributed.sequence import SequenceGroup


def splits_heads(heads: int, kv_heads: int, processes: int) -> bool:
    """Whether each process can get an equal number of query heads, with the key/value heads that they use."""
    return heads % processes == 0 and (kv_heads % processes == 0 or processes % kv_heads == 0)


def tokens_to_heads(tensor: Tensor, sequence: SequenceGroup) -> Tensor:
    """(B, n, m, D) of all heads -> (B, n/P, T, D) of this process's; fewer heads than processes are repeated."""
    if tensor.shape[1] < sequence.size:
        tensor = tensor.repeat_interleave(sequence.size // tensor.shape[1], dim=1)
    return _AllToAll.apply(tensor, sequence.group, 1, 2)


def heads_to_tokens(out: Tensor, sequence: SequenceGroup) -> Tensor:
    """(B, T, H/P, D) of this process's heads -> (B, m, H, D) of its tokens."""
    return _AllToAll.apply(out, sequence.group, 1, 2)


class _AllToAll(torch.autograd.Function):
    """Split dimension `split` into one part per process, and concatenate what arrives along dimension `join`."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
        ctx.group, ctx.split, ctx.join = group, split, join
        return _all_to_all(tensor, group, split, join)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _all_to_all(grad, ctx.group, ctx.join, ctx.split), None, None, None


def _all_to_all(tensor: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
    outgoing = torch.stack(tensor.chunk(dist.get_world_size(group), dim=split))  # (P, ...), contiguous
    incoming = torch.empty_like(outgoing)
    # as bytes: gloo has no bf16
    dist.all_to_all_single(incoming.view(torch.uint8), outgoing.view(torch.uint8), group=group)
    return torch.cat(incoming.unbind(), dim=join)
