"""Published rates by the names that GPUs have."""

from types import SimpleNamespace

import pytest
import torch

from script.shared.card import describe_card, peak_tflops, run_settings


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100-PCIE-16GB", None),
    ],
)
def test_names(name, tflops):
    assert peak_tflops(name) == tflops


def test_a_cpu_has_no_rate(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = describe_card()
    assert found.keys() == {"hardware", "matrix_tflops", "peak_tflops"}
    assert found["matrix_tflops"] is found["peak_tflops"] is None


@pytest.mark.parametrize(("card", "budget"), [(80, 32), (24, 23)])
def test_runs_fit_the_card(card, budget, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = SimpleNamespace(total_memory=card * 2**30 - 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert run_settings() == {"bf16": True, "memory_budget_gib": budget}
