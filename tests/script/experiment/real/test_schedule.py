"""Several threads train and measure rows: none waits while there is something to do."""

import threading
import time

import pytest

from script.experiment.real.schedule import Schedule


def test_trained_rows_wait_for_key_tokens_and_workers_do_not():
    schedule = Schedule(["keys", "a", "b"])
    assert [schedule.take() for _ in range(2)] == [("keys", None), ("a", None)]
    schedule.trained("a", finds_keys=False)
    assert schedule.take() == ("b", None), "a is not measured yet"
    schedule.trained("keys", finds_keys=True)
    assert schedule.take() == (None, "keys")
    schedule.trained("b", finds_keys=False)
    schedule.keys_known()
    assert [schedule.take() for _ in range(3)] == [(None, "a"), (None, "b"), None]


def test_measuring_comes_before_further_training():
    schedule = Schedule(["a", "b"])
    schedule.keys_known()
    assert schedule.take() == ("a", None)
    schedule.trained("a", finds_keys=False)
    assert schedule.take() == (None, "a")
    assert schedule.take() == ("b", None)


def test_after_the_time_limit_what_is_trained_is_measured():
    limit = [True]
    schedule = Schedule(["keys", "a", "b"], lambda: limit[0])
    assert [schedule.take()[0] for _ in range(2)] == ["keys", "a"]
    limit[0] = False
    schedule.trained("a", finds_keys=False)
    schedule.failed()
    schedule.keys_known()
    assert [schedule.take() for _ in range(2)] == [(None, "a"), None]
    assert list(schedule.waiting) == ["b"]


def test_stopped():
    """A thread that waits for another's row ends, and no further row is started."""
    schedule = Schedule(["keys", "a"])
    assert schedule.take() == ("keys", None)
    assert schedule.take() == ("a", None)
    ended = []
    thread = threading.Thread(target=lambda: ended.append(schedule.take()), daemon=True)
    thread.start()
    schedule.waiting.append("b")
    schedule.stop()
    thread.join(20)
    assert ended == [None]


@pytest.mark.parametrize("keys_found", [True, False])
def test_threads(keys_found):
    """Each row once, measured after the key tokens; all threads end."""
    rows = list(range(20))
    schedule, found, lock = Schedule(rows), [], threading.Lock()

    def work():
        while (item := schedule.take()) is not None:
            row, trained = item
            time.sleep(0.001)
            if row == 0 and not keys_found:
                schedule.failed()
                schedule.keys_known()
            elif row is not None:
                schedule.trained(row, finds_keys=row == 0)
            else:
                with lock:
                    found.append(trained)
                if trained == 0:
                    schedule.keys_known()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert sorted(found) == rows[0 if keys_found else 1 :]
    if keys_found:
        assert found[0] == 0
