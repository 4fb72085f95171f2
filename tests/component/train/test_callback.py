"""What a run says of its speed, and when it goes over to full attention."""

import argparse

import pytest
import torch
from transformers import TrainerState

from component.train.callback import FullAttentionCallback, SpeedCallback


def test_what_a_run_says_of_its_speed(monkeypatch):
    """Two steps of 2 and 3 seconds and 100 tokens each, with a minute between them that belongs to neither."""
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
    assert callback.since_last_time()["tokens_per_second"] == 40.0
    step()
    assert callback.since_last_time()["tokens_per_second"] == 100.0
    assert "tokens_per_second" not in callback.since_last_time()
    assert list(callback.step_seconds) == [2.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("ratio", "steps", "first_full"),
    [(0.1, 1000, 900), (0.25, 10, 8), (0.5, 4, 2), (0.01, 10, 9), (1.0, 3, 0)],  # round(2.5) is 2
)
def test_the_last_steps_have_full_attention(ratio, steps, first_full, monkeypatch):
    """From one step on, and asked for once; a run that resumes later has it from its first step on."""
    model, asked = object(), []
    monkeypatch.setattr("component.train.callback.use_full_attention", asked.append)
    callback, state = FullAttentionCallback(ratio), TrainerState(max_steps=steps)
    for step in range(steps):
        state.global_step = step
        callback.on_step_begin(None, state, None, model=model)
        assert asked == ([model] if step >= first_full else [])
    resumed = FullAttentionCallback(ratio)
    resumed.on_step_begin(None, state, None, model=model)
    assert (len(asked), resumed.is_full) == (2, True)
