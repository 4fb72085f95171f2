"""The original's rolled S2-Attn equals the reference, in values and gradients."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

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
