"""Segments in one autograd node: the fused path, gradients, layouts, and saved attention for recomputation.

Shapes: B batch, T tokens, H query heads, Hkv key/value heads, D head size, g group size in tokens.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from component.attention import kernel
from component.attention.segment import SavedAttention, causal_sdpa
from component.attention.shift_short import shift_short_attention
from tests.reference.attention import HEADS, D, assert_equals_loop, positions, random_inputs, with_gradients

FUSED = "FusedAttentionBackward"
PATHS = pytest.mark.parametrize("position_ids", [None, positions([5, 18], [23])], ids=["whole", "packed"])


def path_taken(inputs, *args, **kwargs) -> str:
    return shift_short_attention(*inputs, *args, **kwargs).grad_fn.name()


@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_fused_kernels_are_used(heads, kv_heads, dtype, position_ids):
    inputs = [tensor.to(dtype) for tensor in random_inputs(2, heads, kv_heads, 23)]
    assert path_taken(inputs, 6, position_ids) == FUSED


@PATHS
@pytest.mark.parametrize("length", [23, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_without_a_fused_kernel(heads, kv_heads, length, position_ids):
    inputs = random_inputs(2, heads, kv_heads, length)
    position_ids = position_ids[:, :length] if position_ids is not None else None
    with sdpa_kernel(SDPBackend.MATH):
        assert path_taken(inputs, 6, position_ids) != FUSED
        assert_equals_loop(inputs, 6, position_ids)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (9, 3), (4, 1)])
def test_sdpa_without_grouped_query_support(monkeypatch, heads, kv_heads):
    inputs = random_inputs(2, heads, kv_heads, 23)

    def plain(query, key, value):
        return causal_sdpa(query, key, value, None, 0.0)

    def ungrouped(query, key, value, **options):
        assert query.shape[1] == key.shape[1]
        return attend(query, key, value, **options)

    grouped, attend = with_gradients(plain, inputs), F.scaled_dot_product_attention
    monkeypatch.setattr(kernel, "select_kernel", lambda *_, **__: kernel.EFFICIENT)
    monkeypatch.setattr(F, "scaled_dot_product_attention", ungrouped)
    for mine, theirs in zip(with_gradients(plain, inputs), grouped, strict=True):
        assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def varlen_forward(query, key, value, cu_seqlens, longest, scale):
    """The GPU's variable-length kernel, emulated one sequence at a time."""
    assert len(query) == 1
    assert longest == max(cu_seqlens.diff())
    parts = [
        kernel._forward(kernel.CPU_FLASH, *(tensor[:, :, start:end] for tensor in (query, key, value)), scale, True)
        for start, end in pairwise(cu_seqlens.tolist())
    ]
    log_sum_exp = torch.cat([lse for _, (lse, _, _) in parts], dim=2)
    tensors = (log_sum_exp, None, None, cu_seqlens)
    return torch.cat([out for out, _ in parts], dim=2), kernel.SavedForBackward(kernel.VARLEN, tensors, longest)


def varlen_backward(grad_out, query, key, value, out, saved, scale):
    log_sum_exp, _, _, cu_seqlens = saved.tensors
    parts = []
    for start, end in pairwise(cu_seqlens.tolist()):
        grad, q, k, v, o, lse = (x[:, :, start:end] for x in (grad_out, query, key, value, out, log_sum_exp))
        parts.append(kernel._backward(kernel.CPU_FLASH, grad, q, k, v, o, (lse, None, None), scale, True))
    return tuple(torch.cat(grads, dim=2) for grads in zip(*parts, strict=True))


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("group_size", [4, 16])
def test_many_short_documents_in_one_call(monkeypatch, heads, kv_heads, group_size):
    calls = []
    monkeypatch.setattr(kernel, "supports_varlen", lambda *_: True)
    monkeypatch.setattr(kernel, "_varlen_forward", lambda *args: calls.append(args) or varlen_forward(*args))
    monkeypatch.setattr(kernel, "_varlen_backward", varlen_backward)
    inputs = random_inputs(2, heads, kv_heads, 40)
    documents = [5, 1, 7, 2, 2, 3, 9, 4, 1, 6], [20, 20]
    assert_equals_loop(inputs, group_size, positions(*documents), scale=0.3)
    assert calls
    assert all({0, 5, 6, 13, 15, 17, 20, 29, 33, 34, 40} <= set(call[3].tolist()) for call in calls)
    with monkeypatch.context() as patch:  # only the fused path supports varlen segments
        patch.setattr(kernel, "select_kernel", lambda *_, **__: None)
        assert path_taken(inputs, group_size, positions(*documents)) != FUSED
        assert_equals_loop(inputs, group_size, positions(*documents), scale=0.3)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_gradients_have_the_layout_of_the_inputs(heads, kv_heads):
    """(B, T, H, D) memory of separate projections, and slices of one joint projection."""
    hidden = torch.randn(2, 23, 20)
    sizes = [heads * D, kv_heads * D, kv_heads * D]
    projection = torch.nn.Linear(20, sum(sizes))
    together = projection(hidden).detach().split(sizes, dim=-1)
    apart = [tensor.contiguous() for tensor in together]
    for projected in (apart, together):
        inputs = [tensor.view(2, 23, -1, D).transpose(1, 2).requires_grad_() for tensor in projected]
        output = shift_short_attention(*inputs, 6)
        assert output.is_contiguous()
        for tensor, gradient in zip(inputs, torch.autograd.grad(output.sum(), inputs), strict=True):
            assert gradient.transpose(1, 2).is_contiguous(), gradient.stride()
            assert gradient.shape == tensor.shape
        assert_equals_loop(inputs, 6)


@PATHS
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 3), (4, 1), (1, 1)])
def test_gradients_by_finite_differences(heads, kv_heads, position_ids):
    inputs = [tensor.detach()[..., :4].double().requires_grad_() for tensor in random_inputs(1, heads, kv_heads, 9)]
    position_ids = position_ids[:1, :9] if position_ids is not None else None
    assert path_taken(inputs, 4, position_ids) == FUSED
    assert torch.autograd.gradcheck(lambda *args: shift_short_attention(*args, 4, position_ids), inputs)


def test_dropout_uses_sdpa():
    inputs, saved = random_inputs(2, 4, 2, 23), SavedAttention()
    assert path_taken(inputs, 6, dropout=0.5, saved_attention=saved) != FUSED
    assert saved.out is None
    with_dropout = [shift_short_attention(*inputs, 6, dropout=0.5) for _ in range(2)]
    assert not torch.equal(*with_dropout)


def test_autocast_casts_as_it_does_for_sdpa():
    inputs = random_inputs(2, 4, 2, 23)
    mixed = [inputs[0], inputs[1], inputs[2].detach().bfloat16().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        for given in (inputs, mixed):
            output = shift_short_attention(*given, 6)
            assert output.dtype == torch.bfloat16
            assert output.grad_fn.name() == FUSED
            gradients = torch.autograd.grad(output.sum(), given)
            assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in given]
    assert torch.equal(output, shift_short_attention(*(tensor.bfloat16() for tensor in inputs), 6))


def test_gradients_of_any_layout():
    """The gradient of a sum is an expanded scalar."""
    inputs = random_inputs(2, 4, 2, 23)
    ones = with_gradients(shift_short_attention, inputs, 6, weight=torch.ones(2, 23, 4, D))
    gradients = torch.autograd.grad(shift_short_attention(*inputs, 6).sum(), inputs)
    for mine, theirs in zip(gradients, ones[1:], strict=True):
        assert torch.equal(mine, theirs)


@PATHS
@pytest.mark.parametrize("length", [23, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_recomputing_with_saved_attention_runs_no_kernel(kernel_calls, heads, kv_heads, length, position_ids):
    inputs, saved = random_inputs(2, heads, kv_heads, length), SavedAttention()
    position_ids = position_ids[:, :length] if position_ids is not None else None
    expected = with_gradients(shift_short_attention, inputs, 6, position_ids)
    with torch.no_grad():
        first = shift_short_attention(*inputs, 6, position_ids, saved_attention=saved)
    assert torch.equal(first, expected[0])
    assert saved.out.shape == (2, length, heads, D)
    assert len(saved.parts) == sum(len(call.segments) for call in saved.calls) > 0
    assert kernel_calls
    kernel_calls.clear()
    assert saved.out.grad_fn is None
    out = saved.take()
    assert not saved.is_filled
    for move in (lambda out: out, torch.clone, lambda out: out.transpose(1, 2).contiguous().transpose(1, 2)):
        saved.out = move(out)
        again = with_gradients(shift_short_attention, inputs, 6, position_ids, saved_attention=saved)
        assert not kernel_calls
        for mine, theirs in zip(again, expected, strict=True):
            assert torch.equal(mine, theirs)
        assert not saved.is_filled  # freed with the graph
    saved.fetch = lambda: out  # from elsewhere
    assert saved.is_filled
    again = with_gradients(shift_short_attention, inputs, 6, position_ids, saved_attention=saved)
    assert not kernel_calls
    assert all(map(torch.equal, again, expected))


def test_saved_attention_is_filled_with_gradients_enabled(kernel_calls):
    inputs, saved = random_inputs(1, 4, 2, 23), SavedAttention()
    first = with_gradients(shift_short_attention, inputs, 6, saved_attention=saved)
    assert not saved.out.requires_grad
    kernel_calls.clear()
    again = with_gradients(shift_short_attention, inputs, 6, saved_attention=saved)
    assert not kernel_calls
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, again, strict=True))


def test_saved_attention_stays_empty_without_a_fused_kernel():
    inputs, saved = random_inputs(2, 4, 2, 23), SavedAttention()
    with sdpa_kernel(SDPBackend.MATH):
        expected = with_gradients(shift_short_attention, inputs, 6)
        for _ in range(2):
            result = with_gradients(shift_short_attention, inputs, 6, saved_attention=saved)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(result, expected, strict=True))
            assert saved.out is None
