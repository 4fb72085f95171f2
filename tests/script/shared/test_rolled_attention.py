"""The original's rolled S2-Attn equals the reference, in values and gradients."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from component.attention.interface import use_shift_short_attention
from script.shared.rolled_attention import rolled_shift_short
from tests.reference.shift_short import shift_short_rolled


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_rolled_attention_equals_the_reference(heads, kv_heads):
    module = SimpleNamespace(training=True, config=SimpleNamespace(group_size=8))
    shapes = ((2, heads, 24, 16), (2, kv_heads, 24, 16), (2, kv_heads, 24, 16))
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    found, _ = rolled_shift_short(module, query, key, value, None, scaling=0.25)
    expected = shift_short_rolled(query, key, value, 8, 0.25)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (found, expected))
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_full_attention_in_the_last_steps(tiny_llama_config):
    """`full_attention_ratio` of train.py: every token attends to itself and all before it, at any length."""
    use_shift_short_attention(tiny_llama_config, None)
    module = SimpleNamespace(training=True, config=tiny_llama_config, num_key_value_groups=1)
    query, key, value = torch.randn(3, 2, 4, 7, 8)  # 7 tokens
    found, _ = rolled_shift_short(module, query, key, value, None, scaling=0.25)
    scores = (query @ key.transpose(-1, -2) * 0.25).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    assert_close(found, (scores.softmax(-1) @ value).transpose(1, 2), atol=1e-5, rtol=1e-5)
