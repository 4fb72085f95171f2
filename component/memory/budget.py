import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from component.error import UserError, first_line
from component.memory.plan import MemoryPlan, estimate, next_memory_option
from component.memory.workload import Workload, paged_bytes

CONTEXT_GIB = 0.6  # CUDA's own, which `mem_get_info` already leaves out
LIBRARIES_GIB = 1.2  # NCCL's buffers, cuDNN's and Triton's kernels: outside of PyTorch's allocator
USABLE = 0.98  # of a budget: estimates are that good
HOST_SHARE = 0.8  # of the host memory that is free: pinned memory cannot be swapped out


def available_memory(work: Workload, budget_gib: float | None, device: torch.device) -> tuple[float, float]:
    """GiB that a plan may take of the GPU and of the host; infinite where there is no GPU to run out of.

    `budget_gib` caps PyTorch's allocator; what lies outside of it must find room on the card too.
    """
    if device.type != "cuda":
        return math.inf, math.inf
    outside = LIBRARIES_GIB + paged_bytes(work) / 2**30
    gpu = torch.cuda.mem_get_info(device)[0] / 2**30 - outside
    host = psutil.virtual_memory().available / 2**30
    return USABLE * min(gpu, budget_gib or math.inf), HOST_SHARE * host


@contextmanager
def explaining_out_of_memory(work: Workload, plan: MemoryPlan) -> Iterator[None]:
    """Say what to change when the GPU's memory does not suffice after all."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak = estimate(work, plan).peak_gib
        raise UserError(
            f"the GPU is out of memory ({first_line(error)}); the plan was estimated at {peak:.1f} GiB. "
            f"Next: {next_memory_option(work, plan)}"
        ) from error


def limit_memory(budget_gib: float | None) -> None:
    """Make the GPU as small as `budget_gib` GiB for this process: allocations beyond fail as on such a card.

    Raises:
        UserError: there is no GPU, or it is smaller than that.
    """
    if budget_gib is None:
        return
    if not torch.cuda.is_available():
        raise UserError(f"memory_budget_gib: {budget_gib} GiB, but there is no GPU whose memory it could limit")
    total = torch.cuda.mem_get_info()[1]
    if budget_gib * 2**30 > total:
        raise UserError(f"memory_budget_gib: {budget_gib} GiB, but this GPU has {total / 2**30:.1f}")
    torch.cuda.set_per_process_memory_fraction(budget_gib * 2**30 / total)


_most_in_use = 0  # bytes of the whole card, the highest that note_device_memory saw


def note_device_memory() -> None:
    """Look at how much of the card is in use now, for `peak_memory`."""
    global _most_in_use
    free, total = torch.cuda.mem_get_info()
    _most_in_use = max(_most_in_use, total - free)


def peak_memory() -> dict[str, float]:
    """The most that this process took so far, in GiB: of the host's memory, and of the GPU's where there is one.

    Of the GPU: by tensors, held by PyTorch's allocator, and in use on the card, as far as `note_device_memory` was
    called. The last has all that no allocator of PyTorch's knows of: the CUDA context, libraries' own workspaces,
    bitsandbytes' paged optimizer states while they are on the card, and other processes.
    """
    peaks = {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # KiB on Linux
    if torch.cuda.is_available():
        note_device_memory()
        peaks |= {
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            "device_in_use_gib": _most_in_use / 2**30,
        }
    return {name: round(gib, 2) for name, gib in peaks.items()}
