import time
from collections import deque

import torch
from transformers import TrainerCallback

from component.attention.interface import use_full_attention
from component.memory.budget import note_device_memory


class SpeedCallback(TrainerCallback):
    """Seconds and tokens of each optimizer step: its passes and its update, nothing between steps.

    Tokens are the Trainer's num_input_tokens_seen, of all processes, without padding.
    """

    def __init__(self) -> None:
        self.step_seconds: deque[float] = deque(maxlen=100)
        self._seconds, self._tokens = 0.0, 0  # since the last log

    def on_step_begin(self, args, state, control, **kwargs):
        self._began, self._seen = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.step_seconds.append(time.perf_counter() - self._began)
        if args.device.type == "cuda":
            note_device_memory()
        self._seconds += self.step_seconds[-1]
        self._tokens += state.num_input_tokens_seen - self._seen

    def since_last_time(self) -> dict[str, float]:
        """`tokens_per_second` of the steps since this was last asked, and on a GPU `reserved_gib`, the most so far."""
        rates = {"tokens_per_second": round(self._tokens / self._seconds, 1)} if self._tokens else {}
        self._seconds, self._tokens = 0.0, 0
        if torch.cuda.is_initialized():
            rates["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        return rates


class FullAttentionCallback(TrainerCallback):
    """S2-Attn while most steps are taken, full attention in the last `ratio` of them.

    Not in the papers. A model that has only trained inside groups loses some of what full attention, which it is used
    with, had learnt; a few steps bring that back (script/experiment/README.md).
    """

    def __init__(self, ratio: float):
        self.ratio = ratio
        self.is_full = False

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        last_steps = max(1, round(self.ratio * state.max_steps))  # of however short a run
        if not self.is_full and state.global_step >= state.max_steps - last_steps:  # after resuming too
            use_full_attention(model)
            self.is_full = True  # once: walking through all modules leaves the GPU idle
