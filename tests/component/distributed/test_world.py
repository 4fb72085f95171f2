"""Each process's share of the work; tests/script/evaluate/test_evaluate.py starts several processes."""

import pytest
import torch
import torch.distributed as dist

from component.distributed.world import (
    from_first,
    gathered,
    is_first_process,
    joined_processes,
    local_process_count,
    own_share,
    process_count,
    smallest,
)
from component.error import UserError
from tests.processes import run_in_processes


def test_one_process_does_everything(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_processes():
        assert not dist.is_initialized()
        assert (process_count(), is_first_process()) == (1, True)
        assert own_share([1, 2, 3]) == gathered([1, 2, 3]) == [1, 2, 3]


def test_round_robin_shares(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shares.append(own_share(list(range(8))))
        assert is_first_process() == (rank == 0)
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def _first_answers_for_all() -> None:
    def refuse() -> int:
        raise UserError("only the first process saw it")

    assert from_first(dist.get_rank) == 0
    with pytest.raises(UserError, match="only the first process saw it"):
        from_first(refuse)
    assert gathered([dist.get_rank()]) == [0, 1], "and nobody waits"


def test_the_first_process_answers_for_all():
    run_in_processes(_first_answers_for_all, 2)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"--nproc_per_node: more processes than this machine's 2 GPUs"):
        joined_processes().__enter__()


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "2"}, 2),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),  # torchrun
        ({"WORLD_SIZE": "16", "LOCAL_SIZE": "4"}, 4),  # deepspeed
    ],
)
def test_processes_of_this_machine(monkeypatch, environment, count):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert local_process_count() == count


def test_smallest(monkeypatch):
    assert smallest(3.0, 4.0) == [3.0, 4.0]
    monkeypatch.setattr("component.distributed.world.gathered", lambda own: [*own, (1.0, 9.0), (5.0, 2.0)])
    assert smallest(3.0, 4.0) == [1.0, 2.0]
