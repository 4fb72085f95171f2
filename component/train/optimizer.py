"""How is an optimizer kept from waiting for the GPU? bitsandbytes' waits after each of its matrices, hundreds a step.

Its kernels run one after another in CUDA's default stream, as the rest of a step does, so they need not be waited for.
"""

from types import MethodType
from typing import Any

import bitsandbytes.optim.optimizer as library
import torch


def wait_once(optimizer: torch.optim.Optimizer) -> None:
    """Let a bitsandbytes optimizer wait for the GPU at most once a step, at its end; others stay as they are."""
    if isinstance(optimizer, library.Optimizer8bit):  # those with 32 bits are subclasses
        optimizer.step = MethodType(_step, optimizer)


def _step(optimizer: library.Optimizer8bit, closure: Any = None) -> Any:
    step = type(optimizer).step
    if torch.cuda.is_available() and torch.cuda.current_stream() != torch.cuda.default_stream():
        return step(optimizer, closure)
    wait = library.sync_gpu
    library.sync_gpu = _no_wait
    try:
        return step(optimizer, closure)
    finally:
        library.sync_gpu = wait
        if optimizer.is_paged and torch.cuda.is_available():
            torch.cuda.synchronize()  # the CPU may read its states where they are, such as for a checkpoint


def _no_wait(t: torch.Tensor) -> None:
    """Instead of the library's, which calls its argument `t`."""
