"""S2-Attn by heads equals S2-Attn over whole rows."""

import torch
import torch.distributed as dist
from torch.testing import assert_close

from component.attention.shift_short import attend_in_groups
from component.distributed.sequence import join_sequence_group, sequence_group
from script.shared.shift_short_by_heads import attend_by_heads
from tests.processes import run_in_processes
from tests.reference.attention import random_inputs


def by_heads_equals_whole() -> None:
    join_sequence_group(2)
    torch.manual_seed(0)  # the same weights in both processes
    sequence, rank = sequence_group(), dist.get_rank()
    here = slice(12 * rank, 12 * rank + 12)
    documents = [[(0, 5), (5, 24)], [(0, 24)]]
    for group_size in (4, 10, 16):
        inputs = random_inputs(2, 4, 2, 24)
        whole = attend_in_groups(*inputs, group_size, documents, None, 0.0, None)
        weight = torch.randn_like(whole)
        expected = torch.autograd.grad((whole * weight).sum(), inputs)
        parts = [tensor.detach()[:, :, here].requires_grad_() for tensor in inputs]
        out = attend_by_heads(*parts, group_size, documents, None, 0.0, None, sequence=sequence)
        assert_close(out, whole[:, here])
        for mine, theirs in zip(torch.autograd.grad((out * weight[:, here]).sum(), parts), expected, strict=True):
            assert_close(mine, theirs[:, :, here])


def test_by_heads():
    run_in_processes(by_heads_equals_whole, 2)
