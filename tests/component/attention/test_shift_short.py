"""Shift short attention as a function, against a plain loop and against the original's roll.

Shapes: B batch, T tokens, H query heads, Hkv key/value heads, D head size, g group size in tokens.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from component.attention import interface, kernel, shift_short
from component.attention.interface import use_shift_short_attention
from component.attention.shift_short import shift_short_attention
from component.error import UserError
from tests.reference.attention import GROUPS, HEADS, D, assert_equals_loop, positions, random_inputs, with_gradients
from tests.reference.shift_short import keys_seen, seen, shift_short_loop, shift_short_rolled

# The reference itself


def as_text(table: Tensor) -> list[str]:
    return ["".join("x" if cell else "." for cell in row) for row in table.tolist()]


def test_reference_follows_the_definition():
    assert as_text(seen(7, (0,), 4, shifted=False)) == [
        "x......",
        "xx.....",
        "xxx....",
        "xxxx...",
        "....x..",
        "....xx.",
        "....xxx",
    ]
    assert as_text(seen(7, (0,), 4, shifted=True)) == [
        "x......",
        "xx.....",
        "..x....",
        "..xx...",
        "..xxx..",
        "..xxxx.",
        "......x",
    ]
    assert as_text(seen(7, (0, 3), 2, shifted=True)) == [
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
    """Token g-1 attends to token 0 in unshifted heads only."""
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
    weight[:, real:] = 0  # no loss on padding
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


def test_one_row_of_positions_applies_to_all_rows():
    assert_equals_loop(random_inputs(3, 4, 2, 23), 6, positions([9, 14]))


@pytest.mark.parametrize("group_size", [4, 16])
def test_packed_documents_equal_separate_ones(group_size):
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


@pytest.mark.parametrize("group_size", [-2, 0, 1, 3, 129])
def test_odd_or_too_small_groups_are_rejected(group_size, tiny_llama_config):
    with pytest.raises(UserError, match=rf"group_size.*{group_size}"):
        shift_short_attention(*random_inputs(1, 4, 4, 8), group_size)
    with pytest.raises(UserError, match=rf"group_size.*{group_size}"):
        use_shift_short_attention(tiny_llama_config, group_size)


# The original's roll, and full attention


def test_roll_differs_only_in_the_first_half_group_of_the_shifted_heads():
    inputs = random_inputs(2, 4, 4, 32)
    ours, rolled = shift_short_attention(*inputs, 8), shift_short_rolled(*inputs, 8)
    assert_close(ours[:, :, :2], rolled[:, :, :2], atol=1e-5, rtol=1e-5)
    assert_close(ours[:, 4:], rolled[:, 4:], atol=1e-5, rtol=1e-5)
    assert ((ours[:, :4, 2:] - rolled[:, :4, 2:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("rows", [None, [[5, 1, 21], [13, 14]]])
@pytest.mark.parametrize(("heads", "kv_heads", "heads_per_call"), [(8, 4, 4), (8, 8, 4), (6, 3, 4), (4, 1, 4)])
def test_unlimited_groups_are_full_attention(kernel_calls, heads, kv_heads, heads_per_call, rows):
    """Inside documents, and with at most half of the heads per kernel call, which memory plans count on."""
    inputs = random_inputs(2, heads, kv_heads, 27)
    position_ids = None if rows is None else positions(*rows)
    full = shift_short_attention(*inputs, interface.UNLIMITED, position_ids)
    assert max(shape[1] for shape in kernel_calls) == heads_per_call
    assert_equals_loop(inputs, 2 * 27, position_ids)
    assert_close(full, shift_short_loop(*inputs, 2 * 27, position_ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_tokens", [1, 29, 2 * 29, 3 * 29])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 3), (9, 3), (4, 1), (5, 1), (1, 1)])
def test_long_rows_split_the_heads(monkeypatch, heads, kv_heads, head_tokens):
    """Long rows take several kernel calls of a few heads each, with the same output and gradients."""
    query, key, value = (tensor.double().requires_grad_() for tensor in random_inputs(2, heads, kv_heads, 29))
    calls = []
    forward = kernel.attention_forward
    monkeypatch.setattr(kernel, "attention_forward", lambda *a, **k: calls.append(a[0].shape[1]) or forward(*a, **k))
    whole = shift_short_attention(query, key, value, 8)
    whole_gradients = torch.autograd.grad(whole.square().sum(), (query, key, value))
    heads_per_call, calls[:] = max(calls), []
    monkeypatch.setattr(shift_short, "HEAD_TOKENS", head_tokens)
    parts = shift_short_attention(query, key, value, 8)
    assert max(calls) <= heads_per_call
    if kv_heads > 2 and head_tokens == 1:  # one key/value head in each call
        assert max(calls) == heads // kv_heads < heads_per_call
    assert_close(parts, whole, atol=1e-12, rtol=1e-12)
    gradients = torch.autograd.grad(parts.square().sum(), (query, key, value))
    for found, wanted in zip(gradients, whole_gradients, strict=True):
        assert_close(found, wanted, atol=1e-10, rtol=1e-10)
