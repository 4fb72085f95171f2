"""How is it trained, resumed, saved? By the Hugging Face Trainer, with three things of ours.

Checkpoints are adapter folders whose record is written last, so a killed run knows its newest whole one. Evaluation
weighs tokens alike whatever batch they fall in, with full attention, since modules evaluate with full attention. And a
run says what it is about to do before its first step.
"""

import math
import os
import socket
import time
from collections import deque
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import EvalPrediction, PretrainedConfig, Trainer, TrainerCallback

from component.attention.shift_short import use_full_attention
from component.checkpoint import remove_old_checkpoints, write_adapter, write_record
from component.data.chat_template import IGNORE_INDEX
from component.memory.apply import next_token_losses, note_device_memory


class LongQLoRATrainer(Trainer):
    """The Hugging Face Trainer, writing adapter folders and measuring perplexity by the token.

    Args:
        extended_config: the config that goes into adapter folders.
        record: what `longqlora.json` says of this run; steps and tokens are added when it is written.
    """

    def __init__(self, *args, extended_config: PretrainedConfig, record: dict, **kwargs):
        super().__init__(*args, compute_metrics=token_weighted_loss, **kwargs)
        self.extended_config = extended_config
        self.record = record
        self.speed = SpeedCallback()
        self.add_callback(self.speed)
        self.add_callback(GradientCallback)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # here, since the Trainer's history and earlier callbacks have their copies before our callback would be asked
        super().log({**logs, **self.speed.since_last_time()} if "loss" in logs else logs, start_time)

    @cached_property
    def _parameters(self) -> int:
        return self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """As the Trainer counts them, without walking through all modules at every step: 20 ms of a 7B's 500."""
        return 6 * inputs["input_ids"].numel() * self._parameters

    def report(self, split: str, metrics: dict[str, float]) -> None:
        """Print `metrics`, and keep them in output_dir as `split`_results.json, that of "train" with step_seconds."""
        self.log_metrics(split, metrics)
        steps = {"step_seconds": [round(seconds, 4) for seconds in self.speed.step_seconds]}
        self.save_metrics(split, {**metrics, **steps} if split == "train" else metrics)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter's files; the record follows when everything else in the folder is written."""
        folder = Path(output_dir or self.args.output_dir)
        state_dict = None
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            # a gathering that all processes take part in
            state_dict = self.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        names = None
        if self.args.should_save:
            names = write_adapter(folder, self.model, self.processing_class, self.extended_config, state_dict)
        if not _internal_call:
            self._write_record(folder, names)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        # old checkpoints go only after this one is whole
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        written = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._write_record(written)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            remove_old_checkpoints(self.args.output_dir, limit, keep=[written, *([Path(best)] if best else [])])

    def _write_record(self, folder: Path, names: list[str] | None = None) -> None:
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seen = {"steps": self.state.global_step, "trained_tokens": self.state.num_input_tokens_seen}
            write_record(folder, {**self.record, **seen}, names)
        self.accelerator.wait_for_everyone()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(None, summed loss of each row, its number of labels): `token_weighted_loss` puts them together."""
        inputs = self._prepare_inputs(inputs)
        is_learnt = inputs.pop("labels")[:, 1:] != IGNORE_INDEX
        with self.accelerator.autocast():  # which the wrapped model would bring along
            losses = next_token_losses(self.accelerator.unwrap_model(model), **inputs)
        return None, (losses * is_learnt).sum(1), is_learnt.sum(1)


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
    with, had learnt; a few steps bring that back (README.md, "Experiments").
    """

    def __init__(self, ratio: float):
        self.ratio = ratio
        self.is_full = False

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        last_steps = max(1, round(self.ratio * state.max_steps))  # of however short a run
        if not self.is_full and state.global_step >= state.max_steps - last_steps:  # after resuming too
            use_full_attention(model)
            self.is_full = True  # once: walking through all modules leaves the GPU idle


class GradientCallback(TrainerCallback):
    """Lets DeepSpeed's ZeRO-1 and 2 without offload look at all gradients at once, where it would take each by itself.

    For overflows and for their norm, 71 ms of a 7B's 547 at 8192 tokens on an H200: it has 448 LoRA matrices.
    """

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        zero = getattr(optimizer, "optimizer", None)  # accelerate wraps it
        if not hasattr(zero, "has_overflow_partitioned_grads_serial"):
            return
        zero.has_overflow_partitioned_grads_serial = lambda: any_overflow(zero.averaged_gradients)
        norm_of = zero.get_grad_norm_direct  # it sums over processes too

        def get_grad_norm_direct(gradients, params, norm_type=2):
            total = get_total_norm([gradient.float() for gradient in gradients], norm_type)
            return norm_of([total.reshape(1)], params[:1], norm_type)

        zero.get_grad_norm_direct = get_grad_norm_direct


def any_overflow(gradients: dict[int, list[torch.Tensor | None] | None]) -> torch.Tensor:
    """(1,) bool: whether an infinity or NaN is in the gradients of any parameter group, as DeepSpeed keeps them."""
    tensors = [tensor for group in gradients.values() for tensor in group or () if tensor is not None]
    return ~get_total_norm(tensors, norm_type=math.inf).isfinite().reshape(1)


def token_weighted_loss(prediction: EvalPrediction) -> dict[str, float]:
    """`loss` in nats per token over all rows, and its `perplexity`."""
    loss = float(prediction.predictions.sum() / max(prediction.label_ids.sum(), 1))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # exp overflows a float beyond 709


def stand_alone_environment() -> None:
    """What a launcher would set, for plain `python train.py`.

    Without it DeepSpeed looks for MPI, and on several GPUs the Trainer splits batches by nn.DataParallel, which cannot
    hold 4-bit weights.
    """
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
