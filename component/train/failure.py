"""What ends a run early? Losses or gradients that are not finite, lost processes, and whoever terminates it."""

import math
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from component.checkpoint import latest_complete_checkpoint
from component.cli import show
from component.error import OneProcessError, UserError, first_line

SHOWN_TOKENS = 40
LOST = re.compile(  # what gloo, NCCL and PyTorch's store say if another process ended
    r"closed by peer|Connection reset|Connection refused|Broken pipe|Socket Timeout|remote process exited|NCCL error"
    r"|watchdog|Timed out waiting|DistNetworkError|recvValue failed|wait timeout",
    re.IGNORECASE,
)
AT_MINIMUM = "loss scale already at minimum"  # DeepSpeed


def check_loss(
    loss: torch.Tensor, step: int, input_ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase, output_dir: str
) -> None:
    """Refuse a loss that is not finite: with its gradients, all that was learnt would be lost.

    Args:
        step: the optimizer step, from 1; `input_ids`: (B, T), of the micro-batch.
    """
    if torch.isfinite(loss):
        return
    begins = tokenizer.decode(input_ids[0, :SHOWN_TOKENS], skip_special_tokens=True)
    rows = f"a batch of {len(input_ids)} samples, the first of which" if len(input_ids) > 1 else "the sample that"
    raise OneProcessError(
        f"step {step}: the loss is {float(loss)} for {rows} begins with {begins!r}; lower "
        "learning_rate in another run, look at the sample, or use bf16: true instead of fp16. "
        f"{resume_advice(output_dir)}"
    )


def resume_advice(output_dir: str) -> str:
    """Where a run that ended can go on."""
    latest = latest_complete_checkpoint(output_dir)
    if latest is None:
        return "No checkpoint was written yet"
    return f"The last checkpoint is {latest}; resume_from_checkpoint: auto goes on there"


class GradientGuard(TrainerCallback):
    """Ends a run whose gradients are not finite, after the step and before anything of it is saved.

    In fp16 such steps are skipped with a smaller loss scale; then the run ends once that can't help any more.
    """

    norm: Any = None  # of the step's gradients, before clipping; None if the engine does not tell
    scaler: Any = None  # PyTorch's, of fp16 without DeepSpeed

    def on_step_end(self, args, state, control, **kwargs):
        norm = 0.0 if self.norm is None else float(self.norm)
        if math.isfinite(norm) and norm >= 0:  # DeepSpeed says -1
            return
        if not args.fp16:
            raise UserError(
                f"step {state.global_step}: the norm of the gradients is not finite, though the losses are; lower "
                f"max_grad_norm, or learning_rate in another run. {resume_advice(args.output_dir)}"
            )
        if self.scaler is not None and self.scaler.get_scale() < 1:
            raise _scale_error(state.global_step, args.output_dir)


def _scale_error(step: int, output_dir: str) -> UserError:
    return UserError(
        f"step {step}: fp16's loss scale is below 1 and gradients still overflow; use bf16: true where the GPU has "
        f"it, or lower learning_rate in another run. {resume_advice(output_dir)}"
    )


@contextmanager
def explained_failures(trainer: Trainer) -> Iterator[None]:
    """Say in one message what DeepSpeed and PyTorch say in tracebacks."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        step, output_dir = _current_step(trainer), trainer.args.output_dir
        if AT_MINIMUM in str(error):
            raise _scale_error(step, output_dir) from error
        if isinstance(error, RuntimeError) and LOST.search(str(error)):
            raise OneProcessError(
                f"step {step}: another process of this run ended or cannot be reached "
                f"({first_line(error)[:200]}); its own message says why, if it had one. {resume_advice(output_dir)}"
            ) from error
        raise


def _current_step(trainer: Trainer) -> int:
    return min(trainer.state.global_step + 1, trainer.state.max_steps)


@contextmanager
def telling_termination(trainer: Trainer) -> Iterator[None]:
    """Say where the run can go on if it gets SIGTERM: from a scheduler, or from its launcher when a process was lost.

    By a thread: the main one may wait in a collective operation for a process that is no more.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=_wait_for_termination, args=(read, trainer), daemon=True).start()
    before = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    _parents.add(os.getpid())
    yield
    # not after an exception: until it is told, a SIGTERM must not end the process in silence
    _parents.discard(os.getpid())
    signal.set_wakeup_fd(before[1])
    signal.signal(signal.SIGTERM, before[0])
    os.close(write)  # ends the thread


def _wait_for_termination(read: int, trainer: Trainer) -> None:
    while received := os.read(read, 64):
        if signal.SIGTERM in received:  # a byte for each signal that Python handles
            if _is_first_alive():
                output_dir = trainer.args.output_dir
                show(f"error: step {_current_step(trainer)}: terminated (SIGTERM). {resume_advice(output_dir)}")
            os._exit(128 + signal.SIGTERM)
    os.close(read)


def _is_first_alive() -> bool:
    """Whether no process of this run and machine with a lower LOCAL_RANK is left to tell it."""
    own = int(os.environ.get("LOCAL_RANK", "0"))
    ranks = [own]
    for sibling in psutil.Process(os.getppid()).children() if own else []:
        try:
            if sibling.status() != psutil.STATUS_ZOMBIE:
                ranks.append(int(sibling.environ().get("LOCAL_RANK", own)))
        except psutil.Error:  # it has just ended
            continue
    return own == min(ranks)


_parents: set[int] = set()  # processes that wait for a SIGTERM; those that they fork, to load data, do not


def _forget_in_child() -> None:
    if _parents:
        _parents.clear()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)
