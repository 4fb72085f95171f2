"""Throughput, the switch to full attention, and how FP8 rounds."""

import argparse

import pytest
import torch
from transformers import TrainerState

from component.train.callback import FullAttentionCallback, RoundingCallback, SpeedCallback, Startup


def test_throughput(monkeypatch):
    """Two steps of 2 and 3 seconds and 100 tokens each; the minute between them does not count."""
    times = iter([0.0, 2.0, 62.0, 65.0, 70.0, 71.0])
    monkeypatch.setattr("component.train.callback.time.perf_counter", lambda: next(times))
    arguments = argparse.Namespace(device=torch.device("cpu"))
    state, callback = TrainerState(num_input_tokens_seen=1000), SpeedCallback()

    def step():
        callback.on_step_begin(arguments, state, None)
        state.num_input_tokens_seen += 100
        callback.on_step_end(arguments, state, None)

    step()
    step()
    assert callback.since_last_log()["tokens_per_second"] == 40.0
    step()
    assert callback.since_last_log()["tokens_per_second"] == 100.0
    assert "tokens_per_second" not in callback.since_last_log()
    assert list(callback.step_seconds) == [2.0, 3.0, 1.0]


def test_startup(monkeypatch):
    """A process that started at second 100 reaches its first stage at 107, the end of its first step at 121."""
    times = iter([107.0, 110.0, 118.0, 121.0])
    monkeypatch.setattr("component.train.callback.time.time", lambda: next(times))
    process = argparse.Namespace(create_time=lambda: 100.0)
    monkeypatch.setattr("component.train.callback.psutil.Process", lambda: process)
    startup = Startup("imports")
    startup.ended("weights")
    assert startup.describe() == "10 s so far: imports 7, weights 3"
    arguments, state = argparse.Namespace(device=torch.device("cpu")), TrainerState()
    callback = SpeedCallback(startup)
    for _ in range(3):
        callback.on_step_begin(arguments, state, None)
        callback.on_step_end(arguments, state, None)
    assert startup.seconds == {"imports": 7.0, "weights": 3.0, "trainer": 8.0, "first step": 3.0}


@pytest.mark.parametrize(
    ("ratio", "steps", "first_full"),
    [(0.1, 1000, 900), (0.25, 10, 8), (0.5, 4, 2), (0.01, 10, 9), (1.0, 3, 0)],  # round(2.5) is 2
)
def test_the_last_steps_have_full_attention(ratio, steps, first_full, monkeypatch):
    """Switched once; a run resumed after that switches at its first step."""
    model, switched = object(), []
    monkeypatch.setattr("component.train.callback.use_full_attention", switched.append)
    callback, state = FullAttentionCallback(ratio), TrainerState(max_steps=steps)
    for step in range(steps):
        state.global_step = step
        callback.on_step_begin(None, state, None, model=model)
        assert switched == ([model] if step >= first_full else [])
    resumed = FullAttentionCallback(ratio)
    resumed.on_step_begin(None, state, None, model=model)
    assert (len(switched), resumed.is_full) == (2, True)


def test_rounding_follows_the_steps_done(monkeypatch):
    told = []
    monkeypatch.setattr("component.train.callback.round_weights_for_step", told.append)
    callback = RoundingCallback()
    for step in (7, 8):
        callback.on_step_begin(None, TrainerState(global_step=step), None)
    callback.on_train_end(None, TrainerState(global_step=9), None)
    assert told == [7, 8, 0]
