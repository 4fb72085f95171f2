"""Shift short attention against a plain loop, against stock Hugging Face attention, and by its Jacobian.

Shapes: B batch, T tokens, H query heads, Hkv key/value heads, D head size, g group size in tokens.
"""

import copy
import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from component.attention import interface as attention
from component.attention import kernel, shift_short
from component.attention.interface import has_plain_attention, use_shift_short_attention
from component.attention.kernel import describe_kernels
from component.attention.segment import SavedAttention, causal_sdpa
from component.attention.shift_short import shift_short_attention
from component.error import UserError
from tests.reference.shift_short import LOOP, ROLLED, keys_seen, seen, shift_short_loop, shift_short_rolled

HEADS = [(4, 4), (4, 2), (6, 3), (4, 1), (9, 3), (1, 1)]  # H, Hkv
GROUPS = [2, 4, 6, 16, 64]
D = 8


def random_inputs(rows: int, heads: int, kv_heads: int, length: int, seed: int = 0) -> list[Tensor]:
    """Query, key, value as Hugging Face gives them: (B, T, H, D) seen as (B, H, T, D), not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, length, n, D, generator=generator).transpose(1, 2).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def with_gradients(function, inputs: list[Tensor], *args, weight: Tensor | None = None, **kwargs) -> list[Tensor]:
    """The output and the gradients by query, key and value of its sum, weighted by `weight` or at random."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs, *args, **kwargs)
    if weight is None:
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), inputs)]


def assert_equals_loop(inputs, group_size, position_ids=None, **kwargs):
    ours = with_gradients(shift_short_attention, inputs, group_size, position_ids, **kwargs)
    loop = with_gradients(shift_short_loop, inputs, group_size, position_ids, **kwargs)
    for name, mine, theirs in zip(("output", "query", "key", "value"), ours, loop, strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def positions(*rows_of_lengths: list[int]) -> Tensor:
    """position_ids (B, T) of rows in which documents of these lengths are packed."""
    return torch.tensor([[p for length in lengths for p in range(length)] for lengths in rows_of_lengths])


# The reference itself, by hand


def drawn(table: Tensor) -> list[str]:
    return ["".join("x" if cell else "." for cell in row) for row in table.tolist()]


def test_reference_sees_what_the_definition_says():
    assert drawn(seen(7, (0,), 4, shifted=False)) == [
        "x......",
        "xx.....",
        "xxx....",
        "xxxx...",
        "....x..",
        "....xx.",
        "....xxx",
    ]
    assert drawn(seen(7, (0,), 4, shifted=True)) == [
        "x......",
        "xx.....",
        "..x....",
        "..xx...",
        "..xxx..",
        "..xxxx.",
        "......x",
    ]
    assert drawn(seen(7, (0, 3), 2, shifted=True)) == [
        "x......",
        ".x.....",
        ".xx....",
        "...x...",
        "....x..",
        "....xx.",
        "......x",
    ]
    assert keys_seen(6, (0,), 4, shifted=False) == range(4, 7)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "unshifted"), [(4, 4, 2), (4, 2, 2), (6, 3, 2), (4, 1, 2), (9, 3, 3), (5, 1, 2), (1, 1, 0)]
)
def test_heads_are_split_along_key_value_heads(heads, kv_heads, unshifted):
    """Token g-1 of an unshifted head sees token 0; of a shifted head it does not."""
    query, key, value = random_inputs(1, heads, kv_heads, 4)
    output = shift_short_attention(query, key, value, 4)
    sees_first = []
    for head in range(heads):
        (gradient,) = torch.autograd.grad(output[0, 3, head].sum(), value, retain_graph=True)
        sees_first.append(bool(gradient[0, :, 0].any()))
    assert sees_first == [True] * unshifted + [False] * (heads - unshifted)


# One call, against the loop


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_equals_loop_at_every_length(heads, kv_heads, group_size):
    for length in range(1, 68):
        inputs = random_inputs(1 + length % 3, heads, kv_heads, length, seed=length)
        assert_equals_loop(inputs, group_size)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("length", "group_size"), [(129, 64), (129, 128), (201, 50), (201, 2), (257, 64), (200, 400)])
def test_equals_loop_at_larger_lengths(heads, kv_heads, length, group_size):
    assert_equals_loop(random_inputs(2, heads, kv_heads, length), group_size)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_equals_loop_with_contiguous_inputs_and_a_scale(heads, kv_heads):
    inputs = [tensor.contiguous() for tensor in random_inputs(2, heads, kv_heads, 21)]
    assert_equals_loop(inputs, 6, scale=0.5)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_output_has_the_promised_shape(heads, kv_heads):
    assert shift_short_attention(*random_inputs(3, heads, kv_heads, 21), 4).shape == (3, 21, heads, D)


@pytest.mark.parametrize("length", [1, 5, 8])
def test_up_to_half_a_group_is_plain_causal_attention(length):
    inputs = random_inputs(2, 4, 2, length)

    def plain(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)

    ours = with_gradients(shift_short_attention, inputs, 16)
    for mine, theirs in zip(ours, with_gradients(plain, inputs), strict=True):
        assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("group_size", [4, 16])
@pytest.mark.parametrize("real", [1, 7, 8, 9, 20, 26])
def test_right_padding_cannot_change_a_real_token(group_size, real):
    length = 27
    inputs = random_inputs(2, 4, 2, length)
    other_pads = [
        torch.cat((tensor[:, :, :real], 50 * torch.randn_like(tensor[:, :, real:])), dim=2) for tensor in inputs
    ]
    weight = torch.randn(2, length, 4, D)
    weight[:, real:] = 0  # a pad's output has no loss
    here = with_gradients(shift_short_attention, inputs, group_size, weight=weight)
    there = with_gradients(shift_short_attention, other_pads, group_size, weight=weight)
    assert not torch.equal(here[0][:, real:], there[0][:, real:])
    assert torch.equal(here[0][:, :real], there[0][:, :real])
    for mine, theirs in zip(here[1:], there[1:], strict=True):
        assert torch.equal(mine[:, :, :real], theirs[:, :, :real])
        assert not mine[:, :, real:].any()

    cut = with_gradients(
        shift_short_attention, [tensor[:, :, :real] for tensor in inputs], group_size, weight=weight[:, :real]
    )
    assert_close(here[0][:, :real], cut[0], atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(here[1:], cut[1:], strict=True):
        assert_close(mine[:, :, :real], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group_size", [2, 6, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(
    "rows",
    [
        [[5, 1, 1, 13, 3], [23], [1] * 23],  # other documents in each row
        [[17, 6], [6, 17]],
        [[11, 12]],
    ],
)
def test_packed_rows_equal_loop(heads, kv_heads, group_size, rows):
    assert_equals_loop(random_inputs(len(rows), heads, kv_heads, 23), group_size, positions(*rows))


def test_one_row_of_positions_counts_for_all_rows():
    assert_equals_loop(random_inputs(3, 4, 2, 23), 6, positions([9, 14]))


@pytest.mark.parametrize("group_size", [4, 16])
def test_packed_documents_equal_documents_alone(group_size):
    lengths = [9, 1, 13]
    inputs = random_inputs(1, 6, 3, sum(lengths))
    weight = torch.randn(1, sum(lengths), 6, D)
    packed = with_gradients(shift_short_attention, inputs, group_size, positions(lengths), weight=weight)
    unpacked = with_gradients(shift_short_attention, inputs, group_size, weight=weight)
    assert not torch.allclose(packed[0], unpacked[0], atol=1e-2)
    start = 0
    for length in lengths:
        document = slice(start, start + length)
        alone = with_gradients(
            shift_short_attention, [t[:, :, document] for t in inputs], group_size, weight=weight[:, document]
        )
        assert_close(packed[0][:, document], alone[0], atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(packed[1:], alone[1:], strict=True):
            assert_close(mine[:, :, document], theirs, atol=1e-5, rtol=1e-5)
        start += length


@pytest.mark.parametrize(
    "position_ids", [torch.arange(23)[None], torch.arange(23).repeat(2, 1), 7 + torch.arange(23)[None]]
)
def test_positions_of_one_document_change_nothing(position_ids):
    inputs, before = random_inputs(2, 4, 2, 23), position_ids.clone()
    with_ids = shift_short_attention(*inputs, 6, position_ids)
    assert torch.equal(with_ids, shift_short_attention(*inputs, 6))
    assert torch.equal(position_ids, before)


FUSED = "FusedAttentionBackward"
PATHS = pytest.mark.parametrize("position_ids", [None, positions([5, 18], [23])], ids=["whole", "packed"])


def path_taken(inputs, *args, **kwargs) -> str:
    return shift_short_attention(*inputs, *args, **kwargs).grad_fn.name()


@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_fused_kernels_are_taken(heads, kv_heads, dtype, position_ids):
    inputs = [tensor.to(dtype) for tensor in random_inputs(2, heads, kv_heads, 23)]
    assert path_taken(inputs, 6, position_ids) == FUSED


@PATHS
@pytest.mark.parametrize("length", [23, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_without_a_fused_kernel_it_is_the_same(heads, kv_heads, length, position_ids):
    inputs = random_inputs(2, heads, kv_heads, length)
    position_ids = position_ids[:, :length] if position_ids is not None else None
    with sdpa_kernel(SDPBackend.MATH):
        assert path_taken(inputs, 6, position_ids) != FUSED
        assert_equals_loop(inputs, 6, position_ids)


@PATHS
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (9, 3), (4, 1), (6, 1)])
def test_kernels_without_grouped_heads_give_the_same(monkeypatch, heads, kv_heads, position_ids):
    inputs, calls = random_inputs(2, heads, kv_heads, 23), []
    forward = kernel._forward

    def knows_none(name, query, key, value, scale):
        assert query.shape[1] == key.shape[1]
        calls.append(key.untyped_storage().data_ptr())
        return forward(name, query, key, value, scale)

    monkeypatch.setattr(kernel, "GROUPED", set())
    monkeypatch.setattr(kernel, "_forward", knows_none)
    assert_equals_loop(inputs, 6, position_ids)
    assert set(calls) == {inputs[1].untyped_storage().data_ptr()}  # the keys themselves, not a copy


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (9, 3), (4, 1)])
def test_sdpa_without_grouped_heads_gives_the_same(monkeypatch, heads, kv_heads):
    inputs = random_inputs(2, heads, kv_heads, 23)

    def plain(query, key, value):
        return causal_sdpa(query, key, value, None, 0.0)

    grouped = with_gradients(plain, inputs)
    monkeypatch.setattr(kernel, "select_kernel", lambda *_: kernel.EFFICIENT)
    for mine, theirs in zip(with_gradients(plain, inputs), grouped, strict=True):
        assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def varied_forward(query, key, value, ends, longest, scale):
    """What the GPU's variable-length kernel promises, one sequence at a time."""
    assert len(query) == 1
    assert longest == max(ends.diff())
    parts = [
        kernel._forward(kernel.CPU_FLASH, *(tensor[:, :, start:end] for tensor in (query, key, value)), scale)
        for start, end in pairwise(ends.tolist())
    ]
    log_sum_exp = torch.cat([lse for _, (lse, _, _) in parts], dim=2)
    tensors = (log_sum_exp, None, None, ends)
    return torch.cat([out for out, _ in parts], dim=2), kernel.SavedForBackward(kernel.VARLEN, tensors, longest)


def varied_backward(grad_out, query, key, value, out, saved, scale):
    log_sum_exp, _, _, ends = saved.tensors
    parts = []
    for start, end in pairwise(ends.tolist()):
        grad, q, k, v, o, lse = (x[:, :, start:end] for x in (grad_out, query, key, value, out, log_sum_exp))
        parts.append(kernel._backward(kernel.CPU_FLASH, grad, q, k, v, o, (lse, None, None), scale))
    return tuple(torch.cat(grads, dim=2) for grads in zip(*parts, strict=True))


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("group_size", [4, 16])
def test_many_short_documents_in_one_call(monkeypatch, heads, kv_heads, group_size):
    calls = []
    monkeypatch.setattr(kernel, "supports_varlen", lambda *_: True)
    monkeypatch.setattr(kernel, "_varlen_forward", lambda *args: calls.append(args) or varied_forward(*args))
    monkeypatch.setattr(kernel, "_varlen_backward", varied_backward)
    inputs = random_inputs(2, heads, kv_heads, 40)
    documents = [5, 1, 7, 2, 2, 3, 9, 4, 1, 6], [20, 20]
    assert_equals_loop(inputs, group_size, positions(*documents), scale=0.3)
    assert calls
    assert all({0, 5, 6, 13, 15, 17, 20, 29, 33, 34, 40} <= set(call[3].tolist()) for call in calls)
    with monkeypatch.context() as patch:  # which nothing but the fused path understands
        patch.setattr(kernel, "select_kernel", lambda *_: None)
        assert path_taken(inputs, group_size, positions(*documents)) != FUSED
        assert_equals_loop(inputs, group_size, positions(*documents), scale=0.3)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_gradients_are_laid_out_as_the_inputs(heads, kv_heads):
    """(B, T, H, D) memory, as projections give it, and slices of one projection."""
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


def test_dropout_is_left_to_sdpa():
    inputs, memo = random_inputs(2, 4, 2, 23), SavedAttention()
    assert path_taken(inputs, 6, dropout=0.5, saved_attention=memo) != FUSED
    assert memo.out is None
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
    """A sum's gradient is one number, expanded."""
    inputs = random_inputs(2, 4, 2, 23)
    ones = with_gradients(shift_short_attention, inputs, 6, weight=torch.ones(2, 23, 4, D))
    gradients = torch.autograd.grad(shift_short_attention(*inputs, 6).sum(), inputs)
    for mine, theirs in zip(gradients, ones[1:], strict=True):
        assert torch.equal(mine, theirs)


def test_kernels_are_described():
    assert describe_kernels(torch.device("cpu"), torch.float32) == "SDPA: CPU flash, math"
    with sdpa_kernel(SDPBackend.MATH):
        assert describe_kernels(torch.device("cpu"), torch.float32) == "SDPA: math"


def test_layout_of_another_tensor():
    like = torch.randn(2, 6, 5, 8).transpose(1, 2)[:, :3]
    tensor = torch.randn(2, 3, 6, 8)
    moved = kernel._laid_out_like(like, tensor)
    assert moved.stride() == like.stride()
    assert torch.equal(moved, tensor)
    assert kernel._laid_out_like(like, moved) is moved


# What is kept for recomputation


@pytest.fixture
def kernel_calls(monkeypatch) -> list:
    calls: list = []
    forward = kernel.causal_forward

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(kernel, "causal_forward", counted)
    return calls


@PATHS
@pytest.mark.parametrize("length", [23, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_recomputing_with_a_memo_runs_no_kernel(kernel_calls, heads, kv_heads, length, position_ids):
    inputs, memo = random_inputs(2, heads, kv_heads, length), SavedAttention()
    position_ids = position_ids[:, :length] if position_ids is not None else None
    expected = with_gradients(shift_short_attention, inputs, 6, position_ids)
    with torch.no_grad():
        first = shift_short_attention(*inputs, 6, position_ids, saved_attention=memo)
    assert torch.equal(first, expected[0])
    assert memo.out.shape == (2, length, heads, D)
    assert len(memo.saved_parts) == len(memo.segments) > 0
    assert kernel_calls
    kernel_calls.clear()
    for move in (lambda out: out, torch.clone, lambda out: out.transpose(1, 2).contiguous().transpose(1, 2)):
        memo.out = move(memo.out)
        again = with_gradients(shift_short_attention, inputs, 6, position_ids, saved_attention=memo)
        assert not kernel_calls
        for mine, theirs in zip(again, expected, strict=True):
            assert torch.equal(mine, theirs)
    assert memo.out.grad_fn is None


def test_memo_is_filled_where_gradients_are_wanted_too(kernel_calls):
    inputs, memo = random_inputs(1, 4, 2, 23), SavedAttention()
    first = with_gradients(shift_short_attention, inputs, 6, saved_attention=memo)
    assert not memo.out.requires_grad
    kernel_calls.clear()
    again = with_gradients(shift_short_attention, inputs, 6, saved_attention=memo)
    assert not kernel_calls
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, again, strict=True))


def test_memo_stays_empty_without_a_fused_kernel():
    inputs, memo = random_inputs(2, 4, 2, 23), SavedAttention()
    with sdpa_kernel(SDPBackend.MATH):
        expected = with_gradients(shift_short_attention, inputs, 6)
        for _ in range(2):
            result = with_gradients(shift_short_attention, inputs, 6, saved_attention=memo)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(result, expected, strict=True))
            assert memo.out is None


@pytest.mark.parametrize("group_size", [-2, 0, 1, 3, 129])
def test_odd_or_too_small_groups_are_refused(group_size, tiny_llama_config):
    with pytest.raises(UserError, match=rf"group_size.*{group_size}"):
        shift_short_attention(*random_inputs(1, 4, 4, 8), group_size)
    with pytest.raises(UserError, match=rf"group_size.*{group_size}"):
        use_shift_short_attention(tiny_llama_config, group_size)


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


# Each of the GPU's kernels

ON_GPU = {
    kernel.CUDNN: [SDPBackend.CUDNN_ATTENTION],
    kernel.FLASH: [SDPBackend.FLASH_ATTENTION],
    kernel.EFFICIENT: [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],  # as on a V100
}
HALVES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])


def gpu_inputs(rows, heads, kv_heads, length, dtype, head_size=64) -> list[Tensor]:
    """(B, T, H, D) memory seen as (B, H, T, D)."""
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
    forward = kernel.causal_forward

    def noted(*args, **kwargs):
        out, saved = forward(*args, **kwargs)
        names.add(saved.kernel)
        return out, saved

    monkeypatch.setattr(kernel, "causal_forward", noted)
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
        contiguous = [tensor.contiguous() for tensor in inputs]  # other strides of the same shapes, right after
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
def test_gpu_kernels_of_pytorchs_choice(kernels_run, dtype, tolerance, length):
    assert_equals_loop_on_gpu(gpu_inputs(2, 8, 2, length, dtype), 256, tolerance)
    assert kernels_run
    assert all(name in describe_kernels(torch.device("cuda"), dtype) for name in kernels_run)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_layers_of_other_widths_do_not_share_a_layout(name):
    """Halves of equal shape and strides, out of models with other numbers of heads."""
    with sdpa_kernel(ON_GPU[name]):
        for _ in range(2):
            for heads, kv_heads in ((4, 2), (6, 3), (4, 4)):
                inputs = [tensor.contiguous() for tensor in gpu_inputs(1, heads, kv_heads, 512, torch.bfloat16)]
                assert_equals_loop_on_gpu(inputs, 256, 5e-2)


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_gpu_kernel_of_varied_lengths_equals_loop(kernels_run, heads, kv_heads, dtype, tolerance):
    lengths = [70, 1, 130, 5, 33, 64, 20, 3, 9, 66, 50]
    inputs = gpu_inputs(2, heads, kv_heads, sum(lengths), dtype)
    assert_equals_loop_on_gpu(inputs, 64, tolerance, positions(lengths, lengths[::-1]).cuda())
    assert kernels_run == {kernel.VARLEN}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("rows", [None, [[9] * 50]])
def test_gpu_memo_survives_the_host(kernel_calls, name, rows):
    inputs, memo = gpu_inputs(1, 8, 2, 450, torch.bfloat16), SavedAttention()
    position_ids = positions(*rows).cuda() if rows else None
    with sdpa_kernel(ON_GPU[name]):
        with torch.no_grad():
            first = shift_short_attention(*inputs, 64, position_ids, saved_attention=memo)
        memo.out = memo.out.cpu()
        kernel_calls.clear()
        memo.out = memo.out.cuda()
        assert_equals_loop_on_gpu(inputs, 64, 5e-2, position_ids, saved_attention=memo)
        assert torch.equal(shift_short_attention(*inputs, 64, position_ids, saved_attention=memo), first)
    assert not kernel_calls


# The original's roll, and what is wrong with it


def test_roll_differs_only_in_the_first_half_group_of_the_shifted_heads():
    inputs = random_inputs(2, 4, 4, 32)
    ours, rolled = shift_short_attention(*inputs, 8), shift_short_rolled(*inputs, 8)
    assert_close(ours[:, :, :2], rolled[:, :, :2], atol=1e-5, rtol=1e-5)
    assert_close(ours[:, 4:], rolled[:, 4:], atol=1e-5, rtol=1e-5)
    assert ((ours[:, :4, 2:] - rolled[:, :4, 2:]).abs().amax(-1) > 1e-3).all()


# In a model


def build_model(config, attention_name: str, group_size: int = 8, weights: dict | None = None):
    """A model of `config` with the attention of that name; ours is selected as a user selects it."""
    config = copy.deepcopy(config)
    if attention_name == attention.NAME:
        use_shift_short_attention(config, group_size)
    else:
        config.group_size = group_size
        config._attn_implementation = attention_name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    if weights is not None:
        model.load_state_dict(weights)
    assert model.config._attn_implementation == attention_name
    return model


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 384, (rows, length), generator=torch.Generator().manual_seed(seed))


def sensitivities(model, length: int) -> Tensor:
    """(T, T): how much the last hidden state of the row's token changes with the embedding of the column's token."""
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(1, length, model.config.hidden_size, generator=generator, requires_grad=True)
    output = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    weighted = (output * torch.randn(output.shape, generator=generator)).sum(-1)[0]
    rows = [torch.autograd.grad(token, embeddings, retain_graph=True)[0][0].abs().sum(-1) for token in weighted]
    return torch.stack(rows)


@pytest.fixture
def deep_config(tiny_llama_config) -> LlamaConfig:
    tiny_llama_config.num_hidden_layers = 16
    return tiny_llama_config


@pytest.mark.parametrize(("kv_heads", "length"), [(4, 32), (2, 32), (2, 29), (1, 29)])
def test_no_token_learns_of_a_later_one_through_16_layers(deep_config, kv_heads, length):
    deep_config.num_key_value_heads = kv_heads
    reach = sensitivities(build_model(deep_config, attention.NAME, group_size=8).train(), length)
    assert (reach.triu(1) == 0).all()
    assert (reach.diagonal() > 0).all()
    assert reach[-1, 0] > 0  # groups overlap, so that the last token does learn of the first, far outside its group


def test_the_rolled_original_learns_of_later_tokens(deep_config):
    reach = sensitivities(build_model(deep_config, ROLLED, group_size=8).train(), 32)
    assert (reach.triu(1) != 0).any()
    assert (reach.diagonal(1) > 0).all()  # of the next token above all, which it is trained to predict


def test_the_rolled_original_leaks_next_tokens_only_through_layers(deep_config):
    deep_config.num_hidden_layers = 1
    reach = sensitivities(build_model(deep_config, ROLLED, group_size=8).train(), 32)
    assert (reach[:4, -4:] > 0).all()  # the first half-group sees the last
    assert (reach.diagonal(1) == 0).all()


def test_one_layer_sees_its_group_and_no_more(tiny_llama_config):
    tiny_llama_config.num_hidden_layers = 1
    reach = sensitivities(build_model(tiny_llama_config, attention.NAME, group_size=8).train(), 27)
    expected = seen(27, (0,), 8, shifted=False) | seen(27, (0,), 8, shifted=True)
    assert torch.equal(reach > 0, expected)


def logits_and_gradients(model, loss_mask: Tensor | None = None, **inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of all parameters; tokens outside `loss_mask` (B, T) have no loss."""
    model.zero_grad()
    logits = model(**{"use_cache": False, **inputs}).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)) / logits.shape[1]
    if loss_mask is not None:
        weight = weight * loss_mask[..., None]
    (logits * weight).sum().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(ours, theirs, where: Tensor | None = None):
    logits, other_logits = (ours[0], theirs[0]) if where is None else (ours[0][where], theirs[0][where])
    assert_close(logits, other_logits, atol=1e-4, rtol=1e-4)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        assert_close(gradient, theirs[1][name], atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# "gradient checkpointing" is "activation checkpointing" from transformers 5.23 on; the old name works in all of ours
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])


def twins(config, checkpointing: dict | None, group_size: int = 8):
    """Ours and the loop, of the same weights, both training; only ours recomputes."""
    ours = build_model(config, attention.NAME, group_size).train()
    loop = build_model(config, LOOP, group_size, ours.state_dict()).train()
    if checkpointing is not None:
        ours.gradient_checkpointing_enable(checkpointing)
        ours.enable_input_require_grads()  # as PEFT does; the reentrant kind needs it
    return ours, loop


@CHECKPOINTING
@pytest.mark.parametrize("length", [3, 8, 27, 40])
def test_trained_model_equals_loop(tiny_llama_config, checkpointing, length):
    ours, loop = twins(tiny_llama_config, checkpointing)
    inputs, calls = {"input_ids": token_ids(2, length)}, []
    ours.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert_same(logits_and_gradients(ours, **inputs), logits_and_gradients(loop, **inputs))
    assert len(calls) == (1 if checkpointing is None else 2)  # it was computed once more for the gradients


@CHECKPOINTING
@pytest.mark.parametrize("use_cache", [False, None])
def test_trained_model_with_right_padding_equals_loop(tiny_llama_config, checkpointing, use_cache):
    ours, loop = twins(tiny_llama_config, checkpointing)
    mask = torch.ones(3, 27, dtype=torch.long)
    mask[0, 26:], mask[1, 5:] = 0, 0
    inputs = {"input_ids": token_ids(3, 27), "attention_mask": mask, "use_cache": use_cache}
    result = logits_and_gradients(ours, loss_mask=mask, **inputs)
    assert_same(result, logits_and_gradients(loop, loss_mask=mask, **inputs), where=mask.bool())

    other_pads = {**inputs, "input_ids": torch.where(mask.bool(), inputs["input_ids"], token_ids(3, 27, seed=9))}
    assert_same(result, logits_and_gradients(ours, loss_mask=mask, **other_pads), where=mask.bool())
    alone = ours(input_ids=inputs["input_ids"][1:2, :5], use_cache=False).logits
    assert_close(result[0][1:2, :5], alone.detach(), atol=1e-4, rtol=1e-4)


PACKED = [[5, 1, 21], [13, 14], [27]]


@CHECKPOINTING
@pytest.mark.parametrize("attention_mask", [None, torch.ones(3, 27, dtype=torch.long)])
@pytest.mark.parametrize("use_cache", [False, None])  # None: what the config says, which is True for a fresh Llama
def test_trained_model_keeps_packed_documents_apart(tiny_llama_config, checkpointing, attention_mask, use_cache):
    ours, loop = twins(tiny_llama_config, checkpointing)
    inputs = {"input_ids": token_ids(3, 27), "position_ids": positions(*PACKED)}
    loop_result = logits_and_gradients(loop, **inputs)
    result = logits_and_gradients(ours, **inputs, attention_mask=attention_mask, use_cache=use_cache)
    assert_same(result, loop_result)

    for row, lengths in enumerate(PACKED):
        start = 0
        for length in lengths:
            document = slice(start, start + length)
            alone = ours(input_ids=inputs["input_ids"][row : row + 1, document], use_cache=False).logits.detach()
            assert_close(result[0][row : row + 1, document], alone, atol=1e-4, rtol=1e-4)
            start += length


def test_packed_documents_train_like_documents_alone(tiny_llama_config):
    """Gradients of one packed row are the sum of those of its documents."""
    model, ids, lengths = build_model(tiny_llama_config, attention.NAME).train(), token_ids(1, 27), [5, 1, 21]
    weight = torch.randn(1, 27, 384)

    def gradients(pairs):
        model.zero_grad()
        for inputs, its_weight in pairs:
            (model(**inputs, use_cache=False).logits * its_weight).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    packed = gradients([({"input_ids": ids, "position_ids": positions(lengths)}, weight)])
    alone = gradients(
        [
            ({"input_ids": part}, its_weight)
            for part, its_weight in zip(ids.split(lengths, 1), weight.split(lengths, 1), strict=True)
        ]
    )
    for mine, theirs in zip(packed, alone, strict=True):
        assert_close(mine, theirs, atol=1e-3, rtol=1e-4)


def test_one_row_of_positions_counts_for_a_whole_batch(tiny_llama_config):
    ours, loop = twins(tiny_llama_config, None)
    inputs = {"input_ids": token_ids(3, 27), "position_ids": positions([13, 14])}
    result = logits_and_gradients(ours, **inputs)
    assert_same(result, logits_and_gradients(loop, **inputs))
    alone = ours(input_ids=inputs["input_ids"][:, 13:], use_cache=False).logits.detach()
    assert_close(result[0][:, 13:], alone, atol=1e-4, rtol=1e-4)


def test_packed_documents_with_right_padding(tiny_llama_config):
    ours, loop = twins(tiny_llama_config, None)
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[:, 27:] = 0
    # collators fill the positions of padding with anything: zeros here
    inputs = {"input_ids": token_ids(3, 30), "position_ids": F.pad(positions(*PACKED), (0, 3))}
    result = logits_and_gradients(ours, loss_mask=mask, attention_mask=mask, **inputs)
    assert_same(result, logits_and_gradients(loop, loss_mask=mask, **inputs), where=mask.bool())


@pytest.mark.parametrize(
    "mask", [[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0]]
)
@pytest.mark.parametrize("use_cache", [False, None])
@CHECKPOINTING
def test_left_padding_and_holes_are_refused_in_training(tiny_llama_config, mask, use_cache, checkpointing):
    ours, _ = twins(tiny_llama_config, checkpointing)
    masks = torch.tensor([[1] * 6, mask])  # one bad row is enough
    with pytest.raises(UserError, match=r"attention_mask.*right"):
        ours(input_ids=token_ids(2, 6), attention_mask=masks, use_cache=use_cache)


def test_masks_of_four_dimensions_are_refused_in_training(tiny_llama_config):
    model = build_model(tiny_llama_config, attention.NAME).train()
    with pytest.raises(UserError, match="attention_mask"):
        model(input_ids=token_ids(1, 6), attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool).tril())


def test_attention_dropout_acts_in_training_only(tiny_llama_config):
    inputs = {"input_ids": token_ids(1, 27), "use_cache": False}
    without = build_model(tiny_llama_config, attention.NAME)
    tiny_llama_config.attention_dropout = 0.5
    model = build_model(tiny_llama_config, attention.NAME, weights=without.state_dict())
    stock = build_model(tiny_llama_config, "sdpa", weights=without.state_dict())
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(**inputs).logits, stock.eval()(**inputs).logits)
        model.train()
        assert not torch.allclose(model(**inputs).logits, model(**inputs).logits, atol=1e-3)
        without.train()
        assert torch.equal(without(**inputs).logits, without(**inputs).logits)
        # the first token sees itself alone: its weight of 1 is dropped, or kept and doubled
        first = torch.stack([model(**inputs).logits[0, 0] for _ in range(40)])
        assert len(first.unique(dim=0)) > 1


def test_a_decoder_layer_hands_the_memo_to_its_attention(tiny_llama_config, kernel_calls):
    model = build_model(tiny_llama_config, attention.NAME).model.train()
    layer, hidden = model.layers[0], torch.randn(2, 27, model.config.hidden_size, requires_grad=True)
    position_ids = positions(*PACKED[:2])
    options = {
        "attention_mask": attention.TrainingMask(None, lambda: None),
        "position_ids": position_ids,
        "position_embeddings": model.rotary_emb(hidden, position_ids),
    }

    def segment(**more):
        layer.zero_grad()
        output = layer(hidden, **options, **more)
        output.square().sum().backward()
        return [output.detach(), *(parameter.grad.clone() for parameter in layer.parameters())]

    expected, memo = segment(), SavedAttention()
    with torch.no_grad():
        layer(hidden, **options, saved_attention=memo)
    assert memo.out.shape[:2] == (2, 27)
    kernel_calls.clear()
    again = segment(saved_attention=memo)
    assert not kernel_calls
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, expected, strict=True))


# Outside training it is stock attention


@pytest.fixture
def stock_and_ours(tiny_llama_config):
    stock = build_model(tiny_llama_config, "sdpa").eval()
    return stock, build_model(tiny_llama_config, attention.NAME, weights=stock.state_dict()).eval()


LEFT_PADDED = torch.tensor([[0] * 4 + [1] * 23, [1] * 27, [0] * 26 + [1]])
WITH_HOLES = torch.ones(3, 27, dtype=torch.long).index_fill(1, torch.tensor([3, 11]), 0)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"attention_mask": torch.ones(3, 27, dtype=torch.long)},
        {"attention_mask": LEFT_PADDED},
        {"attention_mask": LEFT_PADDED.flip(1)},
        {"attention_mask": WITH_HOLES},
        {"attention_mask": torch.ones(3, 1, 27, 27, dtype=torch.bool).tril().triu(-5)},
        {"position_ids": positions(*PACKED)},
        {"position_ids": positions([13, 14])},
        {"position_ids": positions(*PACKED), "attention_mask": torch.ones(3, 27, dtype=torch.long)},
    ],
    ids=["none", "ones", "left", "right", "holes", "4d", "packed", "packed-1-row", "packed-ones"],
)
def test_evaluation_is_stock_full_attention(stock_and_ours, inputs, use_cache):
    stock, ours = stock_and_ours
    inputs = {"input_ids": token_ids(3, 27), "use_cache": use_cache, **inputs}
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


def test_training_is_not_full_attention(stock_and_ours):
    _, ours = stock_and_ours
    inputs = {"input_ids": token_ids(3, 27), "use_cache": False}
    with torch.no_grad():
        full, short = ours(**inputs).logits, ours.train()(**inputs).logits
        assert torch.equal(ours.eval()(**inputs).logits, full)  # and back
    # up to g/2 = 4 tokens both see the same; from g = 8 on, each token misses some in one half of the heads
    assert_close(short[:, :4], full[:, :4], atol=1e-5, rtol=1e-5)
    assert ((short[:, 8:] - full[:, 8:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize(
    "inputs",
    [
        {"attention_mask": torch.ones(3, 27, dtype=torch.long)},
        {"attention_mask": LEFT_PADDED},
        {"attention_mask": torch.ones(3, 27, dtype=torch.long), "position_ids": positions(*PACKED)},
    ],
    ids=["ones", "left", "packed"],
)
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("new_tokens", [1, 9])  # 1: a static cache is as long as the prompt
def test_generation_is_stock(stock_and_ours, inputs, cache, new_tokens):
    options = {
        "input_ids": token_ids(3, 27),
        **inputs,
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
        **({"cache_implementation": cache} if cache else {"use_cache": False}),
    }
    stock, ours = (model.generate(**options) for model in stock_and_ours)
    assert ours.sequences.shape == (3, 27 + new_tokens)
    assert torch.equal(ours.sequences, stock.sequences)
    for mine, theirs in zip(ours.logits, stock.logits, strict=True):
        assert torch.equal(mine, theirs)


def test_backward_in_evaluation_is_stock(stock_and_ours):
    stock, ours = (logits_and_gradients(model, input_ids=token_ids(2, 27)) for model in stock_and_ours)
    assert torch.equal(ours[0], stock[0])
    assert all(torch.equal(gradient, stock[1][name]) for name, gradient in ours[1].items())


# Selected through the config


def test_selection_survives_from_pretrained(base_folder):
    config = AutoConfig.from_pretrained(base_folder)
    use_shift_short_attention(config, 8)
    ours = AutoModelForCausalLM.from_pretrained(base_folder, config=config)
    stock = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="sdpa")
    loop = build_model(AutoConfig.from_pretrained(base_folder), LOOP, 8, stock.state_dict()).train()
    assert ours.config._attn_implementation == "shift_short"
    ids = token_ids(1, 27)
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, stock.eval()(ids).logits)
        assert_close(ours.train()(ids).logits, loop(ids).logits, atol=1e-4, rtol=1e-4)


def test_saved_model_is_stock(tmp_path, tiny_llama_config):
    """Nothing in a saved folder asks for an attention that only this project knows."""
    ours = build_model(tiny_llama_config, attention.NAME).eval()
    ours.save_pretrained(tmp_path)
    assert "shift_short" not in json.dumps([json.loads(file.read_text()) for file in tmp_path.glob("*.json")])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(loaded(token_ids(1, 27)).logits, ours(token_ids(1, 27)).logits)


TINY = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def test_sliding_window_shorter_than_the_group_is_refused():
    config = MistralConfig(**TINY, sliding_window=10)
    with pytest.raises(UserError, match=r"group_size.*12.*10"):
        use_shift_short_attention(config, 12)
    assert config._attn_implementation != "shift_short"
    use_shift_short_attention(config, 10)
    use_shift_short_attention(MistralConfig(**TINY, sliding_window=None), 12)
    use_shift_short_attention(Qwen2Config(**TINY, sliding_window=10, use_sliding_window=False), 12)
    with pytest.raises(UserError, match="group_size"):
        use_shift_short_attention(Qwen2Config(**TINY, sliding_window=10, use_sliding_window=True), 12)


def test_full_attention_beyond_a_models_own_window_is_refused():
    with pytest.raises(UserError, match=r"full_attention_ratio.*11 tokens.*window is 10"):
        use_shift_short_attention(MistralConfig(**TINY, sliding_window=10), 4, 11)
    use_shift_short_attention(MistralConfig(**TINY, sliding_window=10), 4, 10)
    use_shift_short_attention(MistralConfig(**TINY, sliding_window=None), 4, 11)
    use_shift_short_attention(Qwen2Config(**TINY, sliding_window=10, use_sliding_window=False), 4, 11)
    with pytest.raises(UserError, match=r"packing.*11 tokens.*window is 10"):
        use_shift_short_attention(MistralConfig(**TINY, sliding_window=10), None, 11)
    use_shift_short_attention(MistralConfig(**TINY, sliding_window=10), None, 10)


@pytest.mark.parametrize(
    ("config", "is_plain"),  # for rows of 10 and of 11 tokens
    [
        (LlamaConfig(**TINY), (True, True)),
        (Qwen3Config(**TINY), (True, True)),
        (MistralConfig(**TINY, sliding_window=None), (True, True)),
        (MistralConfig(**TINY, sliding_window=10), (True, False)),
        (Qwen2Config(**TINY, sliding_window=10, use_sliding_window=True, max_window_layers=1), (True, False)),
        (Qwen2Config(**TINY, sliding_window=10, use_sliding_window=False), (True, True)),
        (Gemma2Config(**TINY), (False, False)),  # its scores are capped
        (GptOssConfig(**TINY), (False, False)),  # sinks
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else None,
)
def test_what_plain_attention_is(config, is_plain):
    assert (has_plain_attention(config, 10), has_plain_attention(config, 11)) == is_plain


@pytest.mark.parametrize("rows", [None, [[5, 1, 21], [13, 14]]])
@pytest.mark.parametrize(("heads", "kv_heads", "at_once"), [(8, 4, 4), (8, 8, 4), (6, 3, 4), (4, 1, 4)])
def test_groups_that_nobody_fills_are_full_attention(kernel_calls, heads, kv_heads, at_once, rows):
    """Inside documents, and with no more heads in a kernel call than groups have: memory plans count on that."""
    inputs = random_inputs(2, heads, kv_heads, 27)
    position_ids = None if rows is None else positions(*rows)
    full = shift_short_attention(*inputs, attention.NO_GROUPS, position_ids)
    assert max(shape[1] for shape in kernel_calls) == at_once
    assert_equals_loop(inputs, 2 * 27, position_ids)
    assert_close(full, shift_short_loop(*inputs, 2 * 27, position_ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**TINY, sliding_window=10),
        Qwen2Config(**TINY, sliding_window=10, use_sliding_window=True, max_window_layers=1),
    ],
    ids=["mistral", "qwen2"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_models_with_a_longer_sliding_window(config, packed):
    ours, loop = twins(config, None)
    inputs = {"input_ids": token_ids(3, 27), **({"position_ids": positions(*PACKED)} if packed else {})}
    assert_same(logits_and_gradients(ours, **inputs), logits_and_gradients(loop, **inputs))
    stock = build_model(config, "sdpa", weights=ours.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(ours.eval()(**inputs).logits, stock(**inputs).logits)


@pytest.mark.parametrize("head_tokens", [1, 29, 2 * 29, 3 * 29])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 3), (9, 3), (4, 1), (5, 1), (1, 1)])
def test_a_share_of_the_heads_at_a_time(monkeypatch, heads, kv_heads, head_tokens):
    """Long rows go through the kernels a few heads at a time: more calls, the same output and gradients."""
    query, key, value = (tensor.double().requires_grad_() for tensor in random_inputs(2, heads, kv_heads, 29))
    calls = []
    forward = kernel.causal_forward
    monkeypatch.setattr(kernel, "causal_forward", lambda *a, **k: calls.append(a[0].shape[1]) or forward(*a, **k))
    whole = shift_short_attention(query, key, value, 8)
    whole_gradients = torch.autograd.grad(whole.square().sum(), (query, key, value))
    at_once, calls[:] = max(calls), []
    monkeypatch.setattr(shift_short, "HEAD_TOKENS", head_tokens)
    parts = shift_short_attention(query, key, value, 8)
    assert max(calls) <= at_once
    if kv_heads > 2 and head_tokens == 1:  # one key/value head in each call
        assert max(calls) == heads // kv_heads < at_once
    assert_close(parts, whole, atol=1e-12, rtol=1e-12)
    gradients = torch.autograd.grad(parts.square().sum(), (query, key, value))
    for found, wanted in zip(gradients, whole_gradients, strict=True):
        assert_close(found, wanted, atol=1e-10, rtol=1e-10)
