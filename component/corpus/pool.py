"""How do several processes map over an input of any size, in order and in bounded memory?"""

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from component.error import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], num_proc: int) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in input order, with at most 2 * num_proc items in flight.

    Raises:
        UserError: a process was killed.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes run in parallel already
    if num_proc == 1:
        for item in items:
            yield item, work(item)
        return
    # forked: the tokenizer is shared, not pickled, and workers start in milliseconds
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_proc, context, _start_worker, (work, os.getpid())) as pool:
        waiting: deque[tuple[Item, Future]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(_run, item)))
                if len(waiting) >= 2 * num_proc:  # the executor's own map would read the whole input ahead
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"--num_proc: one of {num_proc} processes was killed, most likely because memory ran out; use fewer"
            ) from error


_work: Callable[[Any], Any]  # of a worker process


def _start_worker(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work

    def end_with_parent() -> None:  # else the worker of a killed parent waits forever
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run(item: object) -> object:
    return _work(item)
