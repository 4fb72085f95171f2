"""Fixtures shared by the attention tests."""

import pytest

from component.attention import kernel


@pytest.fixture
def kernel_calls(monkeypatch) -> list:
    """The query shapes of all kernel calls."""
    calls: list = []
    forward = kernel.attention_forward

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(kernel, "attention_forward", counted)
    return calls
