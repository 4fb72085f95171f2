"""Which import takes seconds for nothing? bitsandbytes has PyTorch's compiler loaded, for two operations of CPUs."""

import torch


def import_bitsandbytes() -> None:
    """Import bitsandbytes without PyTorch's compiler, which saves 3 of train.py's 13 s of imports; before PEFT.

    It compiles updates of its optimizers for devices without kernels of its own, such as CPUs, and does without where
    that fails. On a GPU nothing calls them.
    """
    compile_as_ever = torch.compile
    torch.compile = _refuse
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_as_ever


def _refuse(*args, **kwargs):
    raise RuntimeError("not compiled")
