"""Available memory, its limits, and the message when it runs out."""

import contextlib
import dataclasses
import math

import pytest
import torch

from component.error import UserError
from component.memory.budget import available_memory, explaining_out_of_memory, limit_memory, most_tokens
from component.memory.workload import Workload
from tests.reference.plain_path import LAYERS, plan_of


def test_limits_without_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert available_memory(None, None, torch.device("cpu")) == (math.inf, math.inf)
    limit_memory(None)
    with pytest.raises(UserError, match="memory_budget_gib"):
        limit_memory(4.0)


def test_out_of_memory_names_the_key_to_change():
    work = Workload(4096, 11008, LAYERS, 32, 32, 128, 32000, 10**8, 10**8, 64, 10**7, tokens=8192, group=2048)
    with (
        pytest.raises(UserError, match=r"out of memory.*keep_layers: 0"),
        explaining_out_of_memory(work, plan_of(keep_layers=LAYERS)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nsomething")
    with contextlib.suppress(ZeroDivisionError), explaining_out_of_memory(work, plan_of()):
        raise ZeroDivisionError


GPU = torch.device("cuda", 0)
WORK = Workload(4096, 11008, LAYERS, 32, 32, 128, 32000, 10**8, 10**8, 64, 2**27, tokens=8192, group=2048)


@pytest.fixture
def free(monkeypatch):
    """20 GiB free of the GPU's 80, and 100 GiB of CPU memory."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (20 * 2**30, 80 * 2**30))
    monkeypatch.setattr("component.memory.budget.free_host_bytes", lambda: 100.0 * 2**30)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("changes", "budget", "processes", "gpu", "host"),
    [
        # 1.2 GiB of libraries and 8 bytes of paged states for each of 2**27 parameters, 1 GiB, lie outside
        ({}, None, 1, 0.98 * 17.8, 80.0),
        ({}, 10.0, 1, 9.8, 80.0),
        ({}, 50.0, 1, 0.98 * 17.8, 80.0),
        ({"optimizer": "adamw_torch"}, None, 1, 0.98 * 18.8, 80.0),
        ({}, None, 8, 0.98 * 17.8, 10.0),
        # 16 bytes of offloaded states for each parameter, 2 GiB, shared by the processes of all machines
        ({"offload_optimizer": True}, None, 1, 0.98 * 18.8, 78.0),
        ({"offload_optimizer": True, "processes": 8}, None, 4, 0.98 * 18.8, 20.0 - 0.25),
        ({"offload_optimizer": True, "trained": 2**40}, None, 1, 0.98 * 18.8, 0.0),
    ],
)
def test_k11_available_memory(free, monkeypatch, changes, budget, processes, gpu, host):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    found = available_memory(dataclasses.replace(WORK, **changes), budget, GPU)
    assert found == pytest.approx((gpu, host))


def test_k11_all_processes_plan_with_the_least(free, monkeypatch):
    monkeypatch.setattr("component.distributed.world.gathered", lambda own: [*own, (11.0, 90.0), (30.0, 5.0)])
    assert available_memory(WORK, None, GPU) == (11.0, 5.0)


@pytest.mark.parametrize(("limit", "expected"), [(0, 0), (1023, 0), (1024, 1024), (5000, 4096), (131072, 131072)])
def test_the_most_tokens_that_fit(limit, expected):
    assert most_tokens(lambda tokens: tokens <= limit) == expected
