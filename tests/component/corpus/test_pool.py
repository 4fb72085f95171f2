"""Several processes work through an input in order, and read no more of it than they have work for."""

import os
import signal
import time

import pytest

from component.corpus.pool import in_order
from component.error import UserError


def square(number: int) -> int:
    time.sleep(0.02 * (number % 3))  # later ones are done before earlier ones
    return number * number


@pytest.mark.parametrize("num_proc", [1, 2, 3])
def test_in_the_order_of_the_input(num_proc):
    assert list(in_order(square, range(9), num_proc)) == [(number, number * number) for number in range(9)]
    assert list(in_order(square, [], num_proc)) == []


@pytest.mark.parametrize(("num_proc", "ahead"), [(1, 1), (2, 4), (3, 6)])
def test_an_endless_input_is_read_no_further_than_needed(num_proc, ahead):
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield taken[-1]

    results = in_order(square, endless(), num_proc)
    assert [next(results) for _ in range(3)] == [(0, 0), (1, 1), (2, 4)]
    assert len(taken) == 2 + ahead
    results.close()


def where(number: int) -> int:
    return os.getpid()


def test_the_work_is_done_elsewhere():
    assert {pid for _, pid in in_order(where, range(3), 1)} == {os.getpid()}
    assert os.getpid() not in {pid for _, pid in in_order(where, range(3), 2)}


def fails(number: int) -> int:
    raise ValueError(f"no {number}")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_defect_keeps_its_name(num_proc):
    with pytest.raises(ValueError, match="no 0"):
        list(in_order(fails, range(3), num_proc))


def dies(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_process_is_one_message():
    with pytest.raises(UserError, match="--num_proc: one of 2 processes was killed"):
        list(in_order(dies, range(3), 2))
