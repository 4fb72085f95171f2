"""Which keys and values does a process need from its left, and how do they get there?

A row of T tokens is split over P processes; process r holds tokens [r T/P, (r+1) T/P). A token attends only to earlier
tokens of its group, so a process needs keys and values between the start of its first token's group and its own first
token, and nothing from its right. Gradients of those keys and values go back to the processes that hold them.

All processes compute all sizes from the same documents, so an all-to-all with known sizes carries everything.

Shapes: B rows, Hkv key/value heads, n of them in one exchange, m = T/P tokens per process, D head size.
"""

from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from component.distributed.sequence import SequenceGroup


class Exchange(NamedTuple):
    """Keys and values of some heads, from the processes that hold them to those that need them; gradients back.

    `fetch` and `give_back` are collective: all processes of `group` must call them, in the same order.
    """

    group: SequenceGroup
    kv_heads: slice
    tokens: tuple[int, ...]  # what each rank needs: so many, directly left of its own

    def fetch(self, key: Tensor, value: Tensor) -> "Pending":
        """Start sending `key` and `value` (B, Hkv, m, D); `joined` makes a tensor of what arrives."""
        rows, _, chunk, size = key.shape
        sent, expected = self._counts(chunk)
        heads = self.kv_heads
        parts = [torch.stack([key[:, heads, chunk - n :], value[:, heads, chunk - n :]]) for n in sent]
        return self._start(parts, [(2, rows, heads.stop - heads.start, n, size) for n in expected], key)

    def joined(self, pending: "Pending") -> Tensor:
        """(2, B, n, tokens, D): key and value of the `tokens` left of this process's."""
        parts = pending.wait()
        return _cat([part for part in parts if part.shape[3]] or parts[:1], dim=3)

    def give_back(self, gradient: Tensor, chunk: int) -> "Pending":
        """Start sending `gradient` of what `joined` returned, with `chunk` = m; `add` takes what arrives."""
        sent, expected = self._counts(chunk)
        shapes = [(*gradient.shape[:3], n, gradient.shape[4]) for n in sent]
        return self._start(list(gradient.split(expected, dim=3)), shapes, gradient)

    def add(self, pending: "Pending", grad_key: Tensor, grad_value: Tensor) -> None:
        """Add the gradients that others give back to those (B, Hkv, m, D) of the keys and values here."""
        chunk = grad_key.shape[2]
        for part in pending.wait():
            for gradient, more in zip((grad_key, grad_value), part, strict=True):
                gradient[:, self.kv_heads, chunk - part.shape[3] :] += more

    def _counts(self, chunk: int) -> tuple[list[int], list[int]]:
        """How many tokens `fetch` sends to each rank, and how many arrive from each; `chunk` = m."""

        def count(source: int, to: int) -> int:  # of the last tokens of `source`
            first_needed = to * chunk - self.tokens[to]
            return max(0, min(chunk, (source + 1) * chunk - first_needed)) if source < to else 0

        ranks, own = range(self.group.size), self.group.rank
        return [count(own, to) for to in ranks], [count(source, own) for source in ranks]

    def _start(self, parts: list[Tensor], shapes: list[tuple[int, ...]], like: Tensor) -> "Pending":
        """Send one of `parts` to each rank, and receive one of `shapes` from each."""
        width, sizes = like.element_size(), [prod(shape) for shape in shapes]
        received = like.new_empty(sum(sizes))
        buffer = _cat([part.flatten() for part in parts if part.numel()] or [like.new_empty(0)], dim=0)
        # as bytes: gloo has no bf16
        work = dist.all_to_all_single(
            received.view(torch.uint8),
            buffer.view(torch.uint8),
            [width * size for size in sizes],
            [width * part.numel() for part in parts],
            group=self.group.group,
            async_op=True,
        )
        return Pending(work, buffer, received, shapes, sizes)


class Pending(NamedTuple):
    """A transfer under way; its buffers must live until `wait`."""

    work: dist.Work
    outgoing: Tensor
    received: Tensor
    shapes: list[tuple[int, ...]]
    sizes: list[int]  # numbers in each part

    def wait(self) -> list[Tensor]:
        """What arrived from each rank."""
        self.work.wait()
        return [part.view(shape) for part, shape in zip(self.received.split(self.sizes), self.shapes, strict=True)]


class FetchedKeys(torch.autograd.Function):
    """Key and value, unchanged, and what an exchange fetches; for attention without fused kernels.

    Key and value pass through, so that the backward, in which all processes take part, runs in each of them.
    """

    @staticmethod
    def forward(ctx, key: Tensor, value: Tensor, exchange: Exchange):
        ctx.exchange = exchange
        return key.clone(), value.clone(), exchange.joined(exchange.fetch(key, value))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_key: Tensor, grad_value: Tensor, grad_left: Tensor):
        grad_key, grad_value = grad_key.clone(), grad_value.clone()
        pending = ctx.exchange.give_back(grad_left, grad_key.shape[2])
        ctx.exchange.add(pending, grad_key, grad_value)
        return grad_key, grad_value, None


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
