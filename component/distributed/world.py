"""Which share of the work belongs to this process? Data parallelism for evaluation under torchrun.

Each process holds the full model on its own GPU and takes every N-th piece of work; or each sequence group does, whose
processes compute a piece together. Results are plain numbers, exchanged at the end over the CPU (gloo). Without
torchrun there is one process, which does everything.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from component.distributed.sequence import join_sequence_group, sequence_group
from component.error import UserError

Piece = TypeVar("Piece")
TIMEOUT = timedelta(days=1)  # for the slowest process; gloo's default of 30 minutes may be too short


@contextmanager
def joined_processes(parts: int = 1) -> Iterator[None]:
    """Join the process group if torchrun started several processes, and a sequence group of `parts` of them.

    Raises:
        UserError: more processes than GPUs, or no multiple of `parts`.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if parts < 1 or processes % parts:
        raise UserError(
            f"--sequence_parallel_size: {parts}, but this run has {processes} "
            f"{'process' if processes == 1 else 'processes'}; start a multiple of it with torchrun --nproc_per_node"
        )
    if processes == 1:
        yield
        return
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > gpus:
            raise UserError(f"--nproc_per_node: more processes than this machine's {gpus} GPUs; use {gpus}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if parts > 1 and torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        join_sequence_group(parts)
        yield
    finally:
        leave_processes()


def leave_processes() -> None:
    """Leave the groups of processes, if there are any: their threads can abort a process that ends inside of them."""
    if dist.is_initialized():
        join_sequence_group(1)
        dist.destroy_process_group()


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_process_count() -> int:
    """Processes of this run on this machine: torchrun's variable, DeepSpeed's, or all."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


def is_first_process() -> bool:
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_share(pieces: list[Piece]) -> list[Piece]:
    """Every N-th of `pieces`, so that each process gets some from the beginning and some from the end.

    The processes of a sequence group get the same ones.
    """
    if not dist.is_initialized():
        return pieces
    sequence = sequence_group()
    size = sequence.size if sequence else 1
    return pieces[dist.get_rank() // size :: dist.get_world_size() // size]


def results_once(values: list[Any]) -> list[Any]:
    """The results of all processes, of those that computed them together once, in rank order, on every process."""
    sequence = sequence_group()
    return gathered(values if sequence is None or sequence.rank == 0 else [])


def gathered(values: list[Any]) -> list[Any]:
    """The values of all processes, in rank order, on every process."""
    if not dist.is_initialized():
        return values
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def from_first(make: Callable[[], Piece]) -> Piece:
    """What `make` returns in the first process, on every process.

    Raises:
        UserError: `make` does; on every process, so that none waits for another.
    """
    found: list[Piece | UserError] = []
    if is_first_process():
        try:
            found = [make()]
        except UserError as error:
            found = [error]
    (result,) = gathered(found)
    if isinstance(result, UserError):
        raise result
    return result


def smallest(*values: float) -> list[float]:
    """Of each of `values` the smallest of all processes', on every process."""
    return [min(column) for column in zip(*gathered([values]), strict=True)]
