"""Available memory, its limits, and the message when it runs out."""

import contextlib
import math

import pytest
import torch

from component.error import UserError
from component.memory.budget import available_memory, explaining_out_of_memory, limit_memory
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
