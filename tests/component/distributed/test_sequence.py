"""Sequence groups."""

import torch
import torch.distributed as dist

from component.distributed.sequence import join_sequence_group, sequence_group
from tests.processes import run_in_processes


def two_groups_of_two() -> None:
    rank = dist.get_rank()
    join_sequence_group(2)
    sequence = sequence_group()
    assert (sequence.size, sequence.rank) == (2, rank % 2)
    row = torch.tensor([[10 * rank, 1], [7, rank]])
    expected = {0: [[0, 1, 10, 1], [7, 0, 7, 1]], 1: [[20, 1, 30, 1], [7, 2, 7, 3]]}
    assert sequence.gathered_tokens(row).tolist() == expected[rank // 2]
    join_sequence_group(1)
    assert sequence_group() is None


def test_groups_are_consecutive_ranks():
    run_in_processes(two_groups_of_two, 4)


def test_one_process_needs_no_group():
    join_sequence_group(1)
    assert sequence_group() is None
