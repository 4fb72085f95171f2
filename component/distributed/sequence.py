"""Which processes share a row, and which part of it is this one's? Sequence parallelism.

The processes of a run form sequence groups of P consecutive ranks. The processes of a group read the same rows; each
holds one of P equal parts of consecutive tokens. Different groups read different rows: data parallelism.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceGroup(NamedTuple):
    size: int  # processes that share a row
    rank: int  # of this process among them
    group: dist.ProcessGroup

    def gathered_tokens(self, tensor: Tensor) -> Tensor:
        """(B, m) of each process -> (B, P m), whole rows, on every process."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)


_own_group: SequenceGroup | None = None


def join_sequence_group(size: int) -> None:
    """Split the processes into groups of `size` that share rows; collective. 1: no sequence parallelism."""
    global _own_group
    _own_group = None
    if size == 1:
        return
    rank = dist.get_rank()
    for first in range(0, dist.get_world_size(), size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)  # all processes create all groups
        if rank in ranks:
            _own_group = SequenceGroup(size, rank - first, group)


def sequence_group() -> SequenceGroup | None:
    """The group of this process; None if each process holds whole rows."""
    return _own_group
