"""Attention over rows that are split over processes, against the same attention over whole rows in one process.

Shapes: B rows, P processes, m tokens per process, T = P m, H query heads, Hkv key/value heads, D head size.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from component.attention import kernel
from component.attention.exchange import Exchange
from component.attention.interface import UNLIMITED, attend_across_processes
from component.attention.segment import SavedAttention
from component.attention.shift_short import attend_in_groups, document_spans
from component.distributed.sequence import SequenceGroup, join_sequence_group, sequence_group
from tests.processes import run_in_processes
from tests.reference.attention import positions

HEADS = [(4, 4), (4, 2), (4, 1), (6, 3), (9, 3), (1, 1)]
TOKENS = [8, 7]  # per process
GROUPS = [2, 4, 6, 8, 12, 16, 24, 26, UNLIMITED]  # smaller than, equal to, twice, three times a process's tokens


ON_CPU = torch.zeros(())


def packed(tokens: int) -> torch.Tensor:
    """Positions (2, tokens): documents that cross the borders of processes, end at them, and are shorter."""
    first = [3, tokens // 2, 1, tokens - tokens // 2 - 4]
    return positions(first, [tokens - 1, 1])


def with_gradients(attend, inputs, weight) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def split_equals_whole(
    chunk: int,
    heads: tuple[int, int],
    group_size: int,
    is_packed: bool,
    is_saved: bool,
    like: torch.Tensor = ON_CPU,  # device and dtype of the split rows
    exact: torch.dtype = torch.float32,  # of the whole rows
    tolerance: tuple[float, float] = (2e-6, 1e-5),
    kernels: Callable = contextlib.nullcontext,  # allows the kernels of the split rows
) -> None:
    sequence = sequence_group()
    tokens, here = sequence.size * chunk, slice(sequence.rank * chunk, (sequence.rank + 1) * chunk)
    torch.manual_seed(0)
    size = 8 if like.device.type == "cpu" else 64
    inputs = [torch.randn(2, tokens, n, size).to(like).transpose(1, 2) for n in (heads[0], heads[1], heads[1])]
    weight = torch.randn(2, tokens, heads[0], size).to(like)
    documents = document_spans(packed(tokens)) if is_packed else None

    def whole(q, k, v):
        return attend_in_groups(q, k, v, group_size, documents, None, 0.0, None)

    saved = SavedAttention() if is_saved else None

    def split(q, k, v):
        return attend_across_processes(q, k, v, group_size, documents, None, 0.0, saved, sequence=sequence)

    parts = [tensor[:, :, here] for tensor in inputs]
    with kernels():
        if is_saved:  # as a layer that is recomputed: a forward pass without gradients, then one from what it saved
            with torch.no_grad():
                split(*parts)
        found = with_gradients(split, parts, weight[:, here])
    out, *gradients = with_gradients(whole, [tensor.to(exact) for tensor in inputs], weight.to(exact))
    expected = [out[:, here], *(gradient[:, :, here] for gradient in gradients)]
    for name, mine, theirs in zip(("output", "query", "key", "value"), found, expected, strict=True):
        atol, rtol = tolerance
        assert_close(mine.to(exact), theirs, atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}")


def all_cases(heads: list[tuple[int, int]], is_fused: bool) -> None:
    join_sequence_group(dist.get_world_size())
    if not is_fused:
        kernel.select_kernel = lambda *_, **__: None
    for case in product(TOKENS, heads, GROUPS, (False, True), (False, True) if is_fused else (False,)):
        check(case)


def check(case: tuple, *more) -> None:
    try:
        split_equals_whole(*case, *more)
    except Exception as error:
        raise AssertionError(f"process {dist.get_rank()}, (tokens, heads, group, packed, saved) = {case}") from error


def test_rows_over_processes_equal_whole_rows():
    run_in_processes(all_cases, 3, [(4, 2), (9, 3), (1, 1)], True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_all_heads(processes):
    run_in_processes(all_cases, processes, HEADS, True)


@pytest.mark.slow
def test_without_fused_kernels():
    run_in_processes(all_cases, 3, HEADS, False)


def test_what_each_process_sends_and_gets():
    # 4 processes of 8 tokens, groups of 24 shifted by 12: token 8 is in [0, 12), 16 in [12, 36), 24 too
    counts = [Exchange(SequenceGroup(4, rank, None), slice(0, 1), (0, 8, 4, 12))._counts(8) for rank in range(4)]
    assert [sent for sent, _ in counts] == [[0, 8, 0, 0], [0, 0, 4, 4], [0, 0, 0, 8], [0, 0, 0, 0]]
    assert [got for _, got in counts] == [[0, 0, 0, 0], [8, 0, 0, 0], [0, 4, 0, 0], [0, 4, 8, 0]]


KERNELS = {
    kernel.CUDNN: [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],  # flash for lengths that cuDNN doesn't get
    kernel.FLASH: [SDPBackend.FLASH_ATTENTION],
    kernel.EFFICIENT: [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


def gpu_cases(name: str, dtype: torch.dtype, tolerance: float) -> None:
    join_sequence_group(dist.get_world_size())
    like, seen = torch.zeros((), device="cuda", dtype=dtype), set()
    forward = kernel.attention_forward

    def recorded(*args, **kwargs):
        out, saved = forward(*args, **kwargs)
        seen.add(saved.kernel)
        return out, saved

    kernel.attention_forward = recorded
    kernels = partial(sdpa_kernel, KERNELS[name], set_priority=True)
    for case in product([256, 248], [(4, 4), (4, 1), (9, 3)], GPU_GROUPS, (False, True), (True,)):
        check(case, like, torch.float64, (tolerance, tolerance), kernels)
    assert name in seen


GPU_GROUPS = [64, 256, 384, 768, UNLIMITED]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", KERNELS)
def test_gpu_kernels(name, dtype, tolerance):
    """Whole rows in fp64 by SDPA; the other GPUs of the machine hold the other parts."""
    processes = torch.cuda.device_count()
    if processes < 2:
        pytest.skip("needs two GPUs")
    run_in_processes(gpu_cases, processes, name, dtype, tolerance, backend="nccl")
