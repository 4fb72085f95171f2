"""Which GPUs are here, and what is the matrix rate of one, measured and published?"""

import os
import platform
from typing import Any

import torch

from component.memory.rate import CARDS, matrix_rate

BUDGET_GIB = 32  # the memory that this project is made for


def describe_card() -> dict:
    """Name, bf16 TFLOP/s of one matrix product of a 7B model (MLP up projection of 8192 tokens), published TFLOP/s."""
    if not torch.cuda.is_available():
        return {"hardware": platform.processor() or platform.machine(), "matrix_tflops": None, "peak_tflops": None}
    tflops = matrix_rate(8192, 4096, 11008, torch.device("cuda"), torch.bfloat16) / 1e12
    name = torch.cuda.get_device_name()
    return {"hardware": name, "matrix_tflops": round(tflops, 1), "peak_tflops": peak_tflops(name)}


def peak_tflops(name: str) -> float | None:
    """Published dense 16-bit TFLOP/s of the GPU that calls itself `name`; None if it is not known."""
    parts = set(name.lower().replace("rtx ", "rtx").replace("-", " ").split())
    # other versions of a chip have other rates than the one in CARDS
    if "laptop" in parts or ({"h100", "h200", "v100"} & parts and {"pcie", "nvl"} & parts):
        return None
    return next((card.tflops for key, card in CARDS.items() if key in parts), None)


def run_settings() -> dict[str, Any]:
    """Keys of train.py's YAML for an experiment's run on a GPU, which several may share."""
    if not torch.cuda.is_available():
        return {}
    total = torch.cuda.get_device_properties(0).total_memory // 2**30
    return {"bf16": True, "memory_budget_gib": min(BUDGET_GIB, total)}


def visible_gpus() -> list[str]:
    """Their names for CUDA_VISIBLE_DEVICES, to give a program one of them; empty without a GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else map(str, range(torch.cuda.device_count()))
    return list(names) if torch.cuda.is_available() else []
