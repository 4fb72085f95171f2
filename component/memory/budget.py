"""How much memory is available, and what was the peak?"""

import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from component.distributed.world import gathered, local_process_count, smallest
from component.error import UserError, first_line
from component.memory.host import free_host_bytes
from component.memory.plan import MemoryPlan, estimate, next_memory_option
from component.memory.workload import Workload, host_optimizer_bytes, paged_bytes

CONTEXT_GIB = 0.6  # CUDA context; `mem_get_info` does not count it as free
LIBRARIES_GIB = 1.2  # NCCL buffers, cuDNN and Triton kernels: outside PyTorch's allocator
USABLE = 0.98  # of a budget: the accuracy of the estimates
HOST_SHARE = 0.8  # of free CPU memory: pinned memory cannot be swapped out
STEP = 1024  # resolution, in tokens, of the longest text that fits


def most_tokens(fits: Callable[[int], bool]) -> int:
    """The largest multiple of STEP that fits, 0 if none; whatever fits, fewer tokens do too."""
    low, high = 0, STEP
    while fits(high):
        low, high = high, 2 * high
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def available_memory(work: Workload, budget_gib: float | None, device: torch.device) -> tuple[float, float]:
    """GiB of GPU memory and of pinned CPU memory that a plan may use in each process; both infinite without a GPU.

    `budget_gib` caps PyTorch's allocator only; what lies outside it must fit on the GPU as well. The processes of a
    machine share its CPU memory, which also holds the optimizer states if those are offloaded. All processes get the
    same numbers, those of the one with the least, so that they choose the same plan.
    """
    if device.type != "cuda":
        return math.inf, math.inf
    outside = LIBRARIES_GIB + paged_bytes(work) / 2**30
    gpu = torch.cuda.mem_get_info(device)[0] / 2**30 - outside
    host = (HOST_SHARE * free_host_bytes() / local_process_count() - host_optimizer_bytes(work)) / 2**30
    gpu, host = smallest(USABLE * min(gpu, budget_gib or math.inf), max(0.0, host))
    return gpu, host


@contextmanager
def explaining_out_of_memory(work: Workload, plan: MemoryPlan) -> Iterator[None]:
    """Turn an out-of-memory error into a `UserError` that names the YAML key to change next."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak = estimate(work, plan).peak_gib
        raise UserError(
            f"the GPU is out of memory ({first_line(error)}); the plan's estimated peak is {peak:.1f} GiB. "
            f"To save memory: {next_memory_option(work, plan)}"
        ) from error


def limit_memory(budget_gib: float | None, field: str = "memory_budget_gib") -> None:
    """Cap PyTorch's allocator at `budget_gib` GiB: allocations beyond it fail as on a GPU of that size.

    Raises:
        UserError: no GPU, or a smaller one.
    """
    if budget_gib is None:
        return
    if not torch.cuda.is_available():
        raise UserError(f"{field}: {budget_gib} GiB, but there is no GPU; leave it out")
    total = torch.cuda.mem_get_info()[1]
    if budget_gib * 2**30 > total:
        raise UserError(f"{field}: {budget_gib} GiB, but this GPU has {total / 2**30:.1f}; lower it")
    torch.cuda.set_per_process_memory_fraction(budget_gib * 2**30 / total)


_device_peak = 0  # bytes, the highest value seen by note_device_memory


def note_device_memory() -> None:
    """Sample the device memory in use, for `peak_memory`."""
    global _device_peak
    free, total = torch.cuda.mem_get_info()
    _device_peak = max(_device_peak, total - free)


def peak_memory() -> dict[str, float]:
    """Peak memory so far, in GiB: CPU memory and, with a GPU, allocated, reserved and device memory.

    Each is that of the process with the most; all processes must call this.

    Device memory is what `note_device_memory` sampled. It includes what PyTorch's allocator does not know of: the CUDA
    context, library workspaces, bitsandbytes' paged optimizer states while on the GPU, and other processes.
    """
    peaks = {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # KiB on Linux
    if torch.cuda.is_available():
        note_device_memory()
        peaks |= {
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            "device_in_use_gib": _device_peak / 2**30,
        }
    processes = gathered([peaks])
    return {name: round(max(found[name] for found in processes), 2) for name in peaks}
