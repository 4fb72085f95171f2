"""Runs a function in several processes that share a process group: gloo, or NCCL with a GPU each."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing


def run_in_processes(function: Callable, processes: int, *args, backend: str = "gloo") -> None:
    """Call `function(*args)`, importable by name, in each process; the first failure is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        torch.multiprocessing.spawn(_call, (processes, store, backend, function, args), nprocs=processes)


def _call(rank: int, processes: int, store: Path, backend: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=processes)
    try:
        function(*args)
    finally:
        dist.destroy_process_group()
