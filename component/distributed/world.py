"""Which share of the work belongs to this process? Data parallelism for evaluation under torchrun.

Each process holds the full model on its own GPU and takes every N-th piece of work. Only plain numbers are exchanged
at the end, over the CPU (gloo). Without torchrun there is one process, which does everything.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from component.error import UserError

Piece = TypeVar("Piece")
TIMEOUT = timedelta(days=1)  # for the slowest process; gloo's default of 30 minutes may be too short


@contextmanager
def joined_processes() -> Iterator[None]:
    """Join the process group if torchrun started several processes.

    Raises:
        UserError: more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > gpus:
            raise UserError(f"--nproc_per_node: more processes than this machine's {gpus} GPUs; use {gpus}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
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
    """Every N-th of `pieces`, so that each process gets some from the beginning and some from the end."""
    return pieces[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else pieces


def gathered(values: list[Any]) -> list[Any]:
    """The values of all processes, in rank order, on every process."""
    if not dist.is_initialized():
        return values
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def smallest(*values: float) -> list[float]:
    """Of each of `values` the smallest of all processes', on every process."""
    return [min(column) for column in zip(*gathered([values]), strict=True)]
