"""Kernel selection, and each kernel against the loop reference; most tests need a GPU.

Shapes: B batch, T tokens, H query heads, Hkv key/value heads, D head size, g group size in tokens.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from component.attention import kernel
from component.attention.kernel import describe_kernels
from component.attention.segment import SavedAttention
from component.attention.shift_short import shift_short_attention
from tests.reference.attention import HEADS, D, assert_equals_loop, positions, random_inputs, with_gradients
from tests.reference.shift_short import shift_short_loop

PATHS = pytest.mark.parametrize("position_ids", [None, positions([5, 18], [23])], ids=["whole", "packed"])


@PATHS
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (9, 3), (4, 1), (6, 1)])
def test_kernels_without_grouped_query_support(monkeypatch, heads, kv_heads, position_ids):
    inputs, calls = random_inputs(2, heads, kv_heads, 23), []
    forward = kernel._forward

    def ungrouped(name, query, key, value, *options):
        assert query.shape[1] == key.shape[1]
        calls.append(key.untyped_storage().data_ptr())
        return forward(name, query, key, value, *options)

    monkeypatch.setattr(kernel, "GROUPED", set())
    monkeypatch.setattr(kernel, "_forward", ungrouped)
    assert_equals_loop(inputs, 6, position_ids)
    assert set(calls) == {inputs[1].untyped_storage().data_ptr()}  # the keys themselves, not a copy


def test_a_kernel_is_selected_if_none_is_given():
    query, key, value = random_inputs(2, 4, 2, 23)
    out, saved = kernel.attention_forward(query, key, value)
    assert saved.kernel == kernel.CPU_FLASH
    assert_close(out.transpose(1, 2), shift_short_loop(query, key, value, 64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grouped", [True, False])
def test_merged_attention_is_attention_over_both_sets_of_keys(monkeypatch, grouped):
    """13 tokens, and 7 earlier keys that all of them see; the gradients of both calls are those of the whole."""
    if not grouped:
        monkeypatch.setattr(kernel, "GROUPED", set())
    query, key, value = (tensor.requires_grad_() for tensor in random_inputs(2, 4, 2, 20))
    query = query[:, :, 7:].detach().requires_grad_()
    sees = torch.ones(13, 20, dtype=torch.bool).tril(7)
    whole = F.scaled_dot_product_attention(query, key, value, attn_mask=sees, enable_gqa=True)
    upstream = torch.randn(whole.shape)
    expected = torch.autograd.grad(whole, (query, key, value), upstream)
    q, k, v = query.detach(), key.detach(), value.detach()
    own, earlier = (k[:, :, 7:], v[:, :, 7:]), (k[:, :, :7], v[:, :, :7])
    out, saved = kernel.attention_forward(q, *own)
    more, more_saved = kernel.attention_forward(q, *earlier, is_causal=False)
    kernel.merge_attention(out, saved, more, more_saved)
    assert_close(out, whole.detach())
    first = kernel.attention_backward(upstream, q, *own, out, saved, None)
    second = kernel.attention_backward(upstream, q, *earlier, out, more_saved, None, is_causal=False)
    assert_close(first[0] + second[0], expected[0])
    for found, before, wanted in zip(first[1:], second[1:], expected[1:], strict=True):
        assert_close(torch.cat([before, found], dim=2), wanted)


def test_describe_kernels():
    assert describe_kernels(torch.device("cpu"), torch.float32) == "SDPA: CPU flash, math"
    with sdpa_kernel(SDPBackend.MATH):
        assert describe_kernels(torch.device("cpu"), torch.float32) == "SDPA: math"


def test_with_strides_of():
    like = torch.randn(2, 6, 5, 8).transpose(1, 2)[:, :3]
    tensor = torch.randn(2, 3, 6, 8)
    moved = kernel._with_strides_of(like, tensor)
    assert moved.stride() == like.stride()
    assert torch.equal(moved, tensor)
    assert kernel._with_strides_of(like, moved) is moved


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("rows", [None, [[70, 1, 130], [201]]], ids=["whole", "packed"])
def test_kernels_of_every_precision_equal_loop(device, heads, kv_heads, dtype, tolerance, rows):
    inputs = [tensor.detach().to(device, dtype) for tensor in random_inputs(2, heads, kv_heads, 201)]
    position_ids = positions(*rows).to(device) if rows else None
    weight = torch.randn(2, 201, heads, D, device=device).to(dtype)
    ours = with_gradients(shift_short_attention, inputs, 64, position_ids, weight=weight)
    loop = with_gradients(shift_short_loop, [t.double() for t in inputs], 64, position_ids, weight=weight.double())
    for mine, theirs in zip(ours, loop, strict=True):
        assert mine.dtype == dtype
        assert_close(mine.double(), theirs, atol=tolerance, rtol=tolerance)


# Each GPU kernel

ON_GPU = {
    kernel.CUDNN: [SDPBackend.CUDNN_ATTENTION],
    kernel.FLASH: [SDPBackend.FLASH_ATTENTION],
    kernel.EFFICIENT: [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],  # as on a V100
}
HALVES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])


def gpu_inputs(rows, heads, kv_heads, length, dtype, head_size=64) -> list[Tensor]:
    """(B, H, T, D) views of (B, T, H, D) memory."""
    shapes = [(rows, length, n, head_size) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, device="cuda").to(dtype).transpose(1, 2) for shape in shapes]


def assert_equals_loop_on_gpu(inputs, group_size, tolerance, position_ids=None, **kwargs) -> None:
    heads, length, head_size = inputs[0].shape[1:]
    weight = torch.randn(len(inputs[0]), length, heads, head_size, device="cuda").to(inputs[0].dtype)
    options = {"position_ids": position_ids, "weight": weight}
    ours = with_gradients(shift_short_attention, inputs, group_size, **options, **kwargs)
    options["weight"] = weight.double()
    loop = with_gradients(shift_short_loop, [tensor.double() for tensor in inputs], group_size, **options)
    for name, mine, theirs in zip(("output", "query", "key", "value"), ours, loop, strict=True):
        assert mine.dtype == inputs[0].dtype
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        assert_close(mine.double(), theirs, atol=tolerance, rtol=tolerance, msg=message)


@pytest.fixture
def kernels_run(monkeypatch) -> set:
    names: set = set()
    forward = kernel.attention_forward

    def recorded(*args, **kwargs):
        out, saved = forward(*args, **kwargs)
        names.add(saved.kernel)
        return out, saved

    monkeypatch.setattr(kernel, "attention_forward", recorded)
    return names


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(
    ("length", "rows"), [(512, None), (448, None), (451, None), (60, None), (448, [[200, 248], [448]])]
)
def test_each_gpu_kernel_equals_loop(kernels_run, name, heads, kv_heads, dtype, tolerance, length, rows):
    inputs = gpu_inputs(2, heads, kv_heads, length, dtype)
    position_ids = positions(*rows).cuda() if rows else None
    with sdpa_kernel(ON_GPU[name]):
        assert_equals_loop_on_gpu(inputs, 128, tolerance, position_ids)
        contiguous = [tensor.contiguous() for tensor in inputs]  # same shapes, other strides
        assert_equals_loop_on_gpu(contiguous, 128, tolerance, position_ids)
    assert kernels_run == {name}


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("head_size", [32, 80, 96, 128])
@pytest.mark.parametrize("name", ON_GPU)
def test_each_gpu_kernel_at_other_head_sizes(kernels_run, name, dtype, tolerance, head_size):
    with sdpa_kernel(ON_GPU[name]):
        assert_equals_loop_on_gpu(gpu_inputs(1, 8, 4, 384, dtype, head_size), 256, tolerance)
    assert kernels_run == {name}


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("length", [512, 451, 1])
def test_gpu_kernels_selected_by_pytorch(kernels_run, dtype, tolerance, length):
    assert_equals_loop_on_gpu(gpu_inputs(2, 8, 2, length, dtype), 256, tolerance)
    assert kernels_run
    assert all(name in describe_kernels(torch.device("cuda"), dtype) for name in kernels_run)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_cached_backward_with_other_layouts(name):
    """Inputs of equal shape and strides from models with other numbers of heads."""
    with sdpa_kernel(ON_GPU[name]):
        for _ in range(2):
            for heads, kv_heads in ((4, 2), (6, 3), (4, 4)):
                inputs = [tensor.contiguous() for tensor in gpu_inputs(1, heads, kv_heads, 512, torch.bfloat16)]
                assert_equals_loop_on_gpu(inputs, 256, 5e-2)


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_gpu_varlen_kernel_equals_loop(kernels_run, heads, kv_heads, dtype, tolerance):
    lengths = [70, 1, 130, 5, 33, 64, 20, 3, 9, 66, 50]
    inputs = gpu_inputs(2, heads, kv_heads, sum(lengths), dtype)
    assert_equals_loop_on_gpu(inputs, 64, tolerance, positions(lengths, lengths[::-1]).cuda())
    assert kernels_run == {kernel.VARLEN}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("rows", [None, [[9] * 50]])
def test_saved_attention_can_be_offloaded(kernel_calls, name, rows):
    inputs, saved = gpu_inputs(1, 8, 2, 450, torch.bfloat16), SavedAttention()
    position_ids = positions(*rows).cuda() if rows else None
    with sdpa_kernel(ON_GPU[name]):
        with torch.no_grad():
            first = shift_short_attention(*inputs, 64, position_ids, saved_attention=saved)
        saved.out = saved.out.cpu()
        kernel_calls.clear()
        saved.out = saved.out.cuda()
        assert_equals_loop_on_gpu(inputs, 64, 5e-2, position_ids, saved_attention=saved)
        assert torch.equal(shift_short_attention(*inputs, 64, position_ids, saved_attention=saved), first)
    assert not kernel_calls
