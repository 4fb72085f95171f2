"""bitsandbytes' optimizers wait for the GPU once a step, and compute what they compute as they are."""

import bitsandbytes as bnb
import bitsandbytes.optim.optimizer as library
import pytest
import torch

from component.train.optimizer import wait_once

KINDS = ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit", "SGD8bit"]


def parameters(device: str) -> list[torch.nn.Parameter]:
    """Of 8-bit states, and one so small that its states keep 32 bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 256), (33, 129), (7, 3), (256, 64)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def optimizer_of(kind: str, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    momentum = {"momentum": 0.9} if kind == "SGD8bit" else {}
    return getattr(bnb.optim, kind)(trained, lr=1e-2, **momentum)


def train(kind: str, device: str, change=lambda optimizer: None, steps: int = 5, busy: torch.Tensor | None = None):
    trained = parameters(device)
    optimizer = optimizer_of(kind, trained)
    change(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        gradients = [torch.randn(p.shape, generator=generator) for p in trained]
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient.to(device)
        if busy is not None:  # gradients that are late: an optimizer that does not follow them would take old ones
            for parameter in trained:
                parameter.grad.mul_(2)
            for _ in range(50):
                busy @ busy
            for parameter in trained:
                parameter.grad.div_(2)
        optimizer.step()
        schedule.step()
    states = [optimizer.state[p][name].float() for p in trained for name in ("state1",)]
    return [p.detach().cpu() for p in trained], [state.cpu() for state in states]


@pytest.mark.parametrize("kind", KINDS)
def test_no_wait_between_matrices(kind, monkeypatch):
    waits = []
    monkeypatch.setattr(library, "sync_gpu", waits.append)
    expected = train(kind, "cpu")
    before = len(waits)
    assert before >= 4 * 5
    found = train(kind, "cpu", wait_once)
    assert len(waits) == before
    for one, other in zip(expected, found, strict=True):
        assert all(map(torch.equal, one, other))


def test_the_library_is_as_before_when_a_step_fails(monkeypatch):
    waits = []
    monkeypatch.setattr(library, "sync_gpu", waits.append)
    trained = parameters("cpu")
    optimizer = optimizer_of("AdamW8bit", trained)
    wait_once(optimizer)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)

    def fail():
        raise ValueError("planned")

    with pytest.raises(ValueError, match="planned"):
        optimizer.step(fail)
    optimizer_of("AdamW8bit", trained).step()
    assert len(waits) == len(trained)  # the other optimizer waits as ever


def test_other_optimizers_stay_as_they_are():
    optimizer = torch.optim.AdamW(parameters("cpu"))
    step = optimizer.step
    wait_once(optimizer)
    assert optimizer.step == step


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_late_gradients_on_a_gpu(kind):
    """The GPU is kept busy, so that the optimizer's kernels are launched before its gradients exist."""
    busy = torch.randn(4096, 4096, device="cuda")
    expected = train(kind, "cuda")
    found = train(kind, "cuda", wait_once, busy=busy)
    for one, other in zip(expected, found, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.gpu
def test_another_stream_waits_as_ever(monkeypatch):
    waits = []
    monkeypatch.setattr(library, "sync_gpu", lambda tensor: (waits.append(tensor), torch.cuda.synchronize()))
    expected = train("AdamW8bit", "cuda", wait_once)
    assert not waits
    with torch.cuda.stream(torch.cuda.Stream()):
        found = train("AdamW8bit", "cuda", wait_once)
    assert waits
    for one, other in zip(expected, found, strict=True):
        assert all(map(torch.equal, one, other))
