"""What happens at each step, and before the first? Seconds, throughput, full attention, how FP8 rounds."""

import time
from collections import deque

import psutil
import torch
from transformers import TrainerCallback

from component.attention.interface import use_full_attention
from component.float8.product import round_weights_for_step
from component.memory.budget import note_device_memory


class Startup:
    """Where does the time from the start of this process to the end of its first step go?

    Args:
        first: the stage that ends now.
    """

    def __init__(self, first: str) -> None:
        self.seconds: dict[str, float] = {}  # stage -> its seconds
        self._last = psutil.Process().create_time()
        self.ended(first)

    def ended(self, stage: str) -> None:
        now = time.time()
        self.seconds[stage], self._last = round(now - self._last, 2), now

    def describe(self) -> str:
        parts = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.0f} s so far: {parts}"


class SpeedCallback(TrainerCallback):
    """Measures seconds and tokens of each optimizer step, without the time between steps.

    Tokens are the Trainer's num_input_tokens_seen: of all processes, without padding.
    """

    def __init__(self, startup: Startup | None = None) -> None:
        self.startup = startup or Startup("before training")
        self.step_seconds: deque[float] = deque(maxlen=100)
        self._seconds, self._tokens = 0.0, 0  # since the last log

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.step_seconds:
            self.startup.ended("trainer")
        self._began, self._seen = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        if not self.step_seconds:
            self.startup.ended("first step")
        self.step_seconds.append(time.perf_counter() - self._began)
        if args.device.type == "cuda":
            note_device_memory()
        self._seconds += self.step_seconds[-1]
        self._tokens += state.num_input_tokens_seen - self._seen

    def since_last_log(self) -> dict[str, float]:
        """`tokens_per_second` since the last call, and on a GPU the peak of `reserved_gib` so far."""
        rates = {"tokens_per_second": round(self._tokens / self._seconds, 1)} if self._tokens else {}
        self._seconds, self._tokens = 0.0, 0
        if torch.cuda.is_initialized():
            rates["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        return rates


class FullAttentionCallback(TrainerCallback):
    """Switches from S2-Attn to full attention for the last `ratio` of the steps.

    Not in the papers. Inference uses full attention, and training only within groups degrades long-range attention; a
    few steps with full attention restore it (script/experiment/README.md).
    """

    def __init__(self, ratio: float):
        self.ratio = ratio
        self.is_full = False

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        last_steps = max(1, round(self.ratio * state.max_steps))  # even in a short run
        if not self.is_full and state.global_step >= state.max_steps - last_steps:  # also after resuming
            use_full_attention(model)
            self.is_full = True  # only once: traversing all modules idles the GPU


class RoundingCallback(TrainerCallback):
    """Rounds frozen weights to FP8 in another way in each step; where nothing is in FP8, it changes nothing."""

    def on_step_begin(self, args, state, control, **kwargs):
        round_weights_for_step(state.global_step)  # also after resuming

    def on_train_end(self, args, state, control, **kwargs):
        round_weights_for_step(0)
