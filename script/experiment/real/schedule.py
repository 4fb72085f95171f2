"""In which order are rows trained and measured, several at a time? What is trained waits for key tokens, not a worker.

Rows are trained in the order given. One row finds the key tokens; once they are known, or can't be, trained rows are
measured before further ones are trained.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Waiting = TypeVar("Waiting")
Trained = TypeVar("Trained")


class Schedule(Generic[Waiting, Trained]):
    """Work for several threads: `take` it, then say `trained` or `ended`.

    Args:
        waiting: rows to train, in order.
        may_start: whether a further row may be trained; if not, those left stay in `waiting`.
    """

    def __init__(self, waiting: Iterable[Waiting], may_start: Callable[[], bool] = lambda: True) -> None:
        self.waiting, self.may_start = deque(waiting), may_start
        self._trained: deque[Trained] = deque()
        self._first: deque[Trained] = deque()  # measured at once: it finds the key tokens
        self._in_training = 0
        self._keys_known = self._is_stopped = False
        self._changed = threading.Condition()

    def take(self) -> tuple[Waiting | None, Trained | None] | None:
        """(a row to train, None), (None, a row to measure), or None when nothing is left. Waits for others' rows."""
        with self._changed:
            while True:
                if self._is_stopped:
                    return None
                if self._first or (self._trained and self._keys_known):
                    return None, (self._first or self._trained).popleft()
                if self.waiting and self.may_start():
                    self._in_training += 1
                    return self.waiting.popleft(), None
                if not self._in_training and (self._keys_known or not self._trained):
                    return None
                self._changed.wait()

    def trained(self, row: Trained, *, finds_keys: bool) -> None:
        with self._changed:
            (self._first if finds_keys else self._trained).append(row)
            self._in_training -= 1
            self._changed.notify_all()

    def failed(self) -> None:
        """A row that was to be trained will not be measured."""
        with self._changed:
            self._in_training -= 1
            self._changed.notify_all()

    def keys_known(self) -> None:
        """Key tokens were found, or nobody looks for them any more."""
        with self._changed:
            self._keys_known = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Hand out nothing more."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
