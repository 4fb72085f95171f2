"""What the tests of attention share."""

import pytest

from component.attention import kernel

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
