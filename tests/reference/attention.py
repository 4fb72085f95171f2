"""Inputs of attention, and ours against the plain loop: outputs and gradients.

Shapes: B batch, T tokens, H query heads, Hkv key/value heads, D head size, g group size in tokens.
"""

import torch
from torch import Tensor
from torch.testing import assert_close

from component.attention.shift_short import shift_short_attention
from tests.reference.shift_short import shift_short_loop

HEADS = [(4, 4), (4, 2), (6, 3), (4, 1), (9, 3), (1, 1)]  # H, Hkv
GROUPS = [2, 4, 6, 16, 64]
D = 8


def random_inputs(rows: int, heads: int, kv_heads: int, length: int, seed: int = 0) -> list[Tensor]:
    """Query, key, value as in Hugging Face models: (B, H, T, D) views of (B, T, H, D) memory."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, length, n, D, generator=generator).transpose(1, 2).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def with_gradients(function, inputs: list[Tensor], *args, weight: Tensor | None = None, **kwargs) -> list[Tensor]:
    """The output, and the gradients of its sum, weighted by `weight` or randomly, for query, key and value."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs, *args, **kwargs)
    if weight is None:
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), inputs)]


def assert_equals_loop(inputs, group_size, position_ids=None, **kwargs):
    ours = with_gradients(shift_short_attention, inputs, group_size, position_ids, **kwargs)
    loop = with_gradients(shift_short_loop, inputs, group_size, position_ids, **kwargs)
    for name, mine, theirs in zip(("output", "query", "key", "value"), ours, loop, strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def positions(*rows_of_lengths: list[int]) -> Tensor:
    """position_ids (B, T) of rows with packed documents of these lengths."""
    return torch.tensor([[p for length in lengths for p in range(length)] for lengths in rows_of_lengths])
