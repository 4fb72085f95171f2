"""Which share of the work is this process's? For measurements that torchrun starts several processes of.

Each process has the whole model on its own GPU and takes every N-th piece of work; only plain numbers are exchanged,
over the CPU (gloo), at the end. Started without torchrun there is one process, and it does everything.
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
LONGEST_WAIT = timedelta(days=1)  # for the process that got the most work; gloo's own 30 minutes may not do


@contextmanager
def joined_processes() -> Iterator[None]:
    """Among the processes that torchrun started, if it did.

    Raises:
        UserError: there are more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > gpus:
            raise UserError(f"--nproc_per_node: more processes than this machine's {gpus} GPUs; use {gpus}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_share(pieces: list[Piece]) -> list[Piece]:
    """Every N-th of `pieces`, so that each process has some from the beginning and some from the end."""
    return pieces[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else pieces


def gathered(values: list[Any]) -> list[Any]:
    """What all processes have, those of the first one first, in every process."""
    if not dist.is_initialized():
        return values
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]
