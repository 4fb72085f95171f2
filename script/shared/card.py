"""Which GPUs are here, and what is the peak matrix rate of one?"""

import os
import platform

import torch

from component.memory.rate import matrix_rate


def describe_card() -> dict:
    """Name, and measured bf16 TFLOP/s of one matrix product of a 7B model (MLP up projection of 8192 tokens)."""
    if not torch.cuda.is_available():
        return {"hardware": platform.processor() or platform.machine(), "matrix_tflops": None}
    tflops = matrix_rate(8192, 4096, 11008, torch.device("cuda"), torch.bfloat16) / 1e12
    return {"hardware": torch.cuda.get_device_name(), "matrix_tflops": round(tflops, 1)}


def visible_gpus() -> list[str]:
    """Their names for CUDA_VISIBLE_DEVICES, to give a program one of them; empty without a GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else map(str, range(torch.cuda.device_count()))
    return list(names) if torch.cuda.is_available() else []
