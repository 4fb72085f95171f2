"""Runs a function or a program in several processes that share a process group: gloo, or NCCL with a GPU each."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.conftest import ROOT


def run_in_processes(function: Callable, processes: int, *args, backend: str = "gloo") -> None:
    """Call `function(*args)`, importable by name, in each process; the first failure is raised here."""
    method = "spawn"
    if backend == "gloo":  # forked from a process that has imported everything, which takes seconds
        method = "forkserver"
        get_context(method).set_forkserver_preload(["component.attention.interface", "pytest"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
            patch.setenv("OMP_NUM_THREADS", "1")
            forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        rest = (processes, Path(folder) / "store", backend, function, args)
        torch.multiprocessing.start_processes(_call, rest, nprocs=processes, start_method=method)


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


def torchrun(program: str, processes: int, *words: object, timeout: float = 300) -> str:
    """Run one of this repository's programs on the CPU; returns its output."""
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, program, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout
