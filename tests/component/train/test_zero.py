"""What DeepSpeed changes: optimizer, clipping, overflow check; and runs without a launcher."""

import json
import math
import os
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from component.train.zero import GradientCallback, any_overflow, describe_optimizer, single_process_environment

TRAIN_ARGS = "train_args/deepspeed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_any_overflow(dtype, value):
    top = torch.finfo(dtype).max  # its square overflows, but it is finite
    groups = {0: [torch.full((3, 5), top, dtype=dtype), None, torch.zeros(7, dtype=dtype)], 1: None, 2: []}
    assert any_overflow(groups).tolist() == [False]
    for tensor, place in ((groups[0][0], (2, 4)), (groups[0][2], (0,))):
        kept = tensor[place].clone()
        tensor[place] = value
        assert any_overflow(groups).tolist() == [True]
        tensor[place] = kept
    assert any_overflow({0: None}).tolist() == [False]


class Zero:
    """DeepSpeed's optimizer as `GradientCallback` sees it, on one of two processes; the other's gradient is 4."""

    averaged_gradients: ClassVar[dict] = {0: [torch.tensor([1.0, 2.0]), torch.tensor([2.0])]}

    def has_overflow_partitioned_grads_serial(self) -> torch.Tensor:
        return torch.tensor([False])

    def get_grad_norm_direct(self, gradients, params, norm_type=2):
        assert len(gradients) == len(params)
        return (sum(gradient.float().norm() ** 2 for gradient in gradients) + 4.0**2) ** 0.5


def test_the_batched_norm_and_overflow_check():
    """Norms are those of all processes: sqrt(3^2 + 4^2)."""
    zero = Zero()
    assert float(zero.get_grad_norm_direct(zero.averaged_gradients[0], ["a", "b"])) == pytest.approx(5.0)
    GradientCallback().on_train_begin(None, None, None, optimizer=SimpleNamespace(optimizer=zero))
    assert "get_grad_norm_direct" in vars(zero)
    for dtype in (torch.float32, torch.float16):  # summed in fp32: 300^2 overflows in fp16
        gradients = [gradient.to(dtype) for gradient in zero.averaged_gradients[0]]
        assert float(zero.get_grad_norm_direct(gradients, ["a", "b"])) == pytest.approx(5.0)
    large = [torch.full((2,), 300.0, dtype=torch.float16)]
    assert float(zero.get_grad_norm_direct(large, ["a"])) == pytest.approx((2 * 300.0**2 + 16) ** 0.5)
    assert zero.has_overflow_partitioned_grads_serial().tolist() == [False]
    zero.averaged_gradients = {0: [torch.tensor([1.0, math.inf])]}  # DeepSpeed replaces them at each step
    assert zero.has_overflow_partitioned_grads_serial().tolist() == [True]


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)


def test_environment_without_a_launcher(no_launcher):
    single_process_environment()
    assert {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
    }  # fmt: skip
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 <= int(os.environ["MASTER_PORT"]) < 65536


def test_a_launchers_environment_is_kept(no_launcher, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    single_process_environment()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("3", "4")
    assert "MASTER_PORT" not in os.environ


@pytest.mark.parametrize(
    ("file", "has", "has_not"),
    [
        (None, ["paged_adamw_32bit"], ["ZeRO", "CPU Adam"]),
        ("deepspeed_config_s2.json", ["ZeRO-2", "CPU Adam", "paged_adamw_32bit", "offload"], ["ignored"]),
        ("deepspeed_config_s2_no_offload.json", ["ZeRO-2", "paged_adamw_32bit"], ["CPU Adam", "ignored"]),
        ("deepspeed_config_s3.json", ["ZeRO-3", "paged_adamw_32bit"], ["CPU Adam", "ignored"]),
    ],
)
def test_the_optimizer_in_effect(pytestconfig, file, has, has_not):
    """accelerate replaces the YAML's by DeepSpeed's CPU Adam if the ZeRO file offloads the optimizer."""
    config = file and str(pytestconfig.rootpath / TRAIN_ARGS / file)
    text = describe_optimizer("paged_adamw_32bit", config, 0.3)
    assert all(fragment in text for fragment in has), text
    assert not any(fragment in text for fragment in has_not), text
    if config:
        with open(config) as stream:  # noqa: PTH123
            assert describe_optimizer("paged_adamw_32bit", json.load(stream), 0.3) == text


def test_ignored_clipping_is_reported():
    assert "max_grad_norm 0.3" in describe_optimizer("adamw_torch", {"zero_optimization": {"stage": 2}}, 0.3)
    assert "max_grad_norm" not in describe_optimizer("adamw_torch", {"zero_optimization": {"stage": 2}}, 0.0)
