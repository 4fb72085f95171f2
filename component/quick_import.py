"""Which import takes seconds for nothing? bitsandbytes has PyTorch's compiler loaded, for two operations of CPUs."""

import torch


def import_bitsandbytes(has_gpu: bool | None = None) -> None:
    """Import bitsandbytes without PyTorch's compiler, which saves 3 of train.py's 13 s of imports; before PEFT.

    It compiles updates of its optimizers for devices without kernels of its own, and does without where that fails.
    On a GPU nothing calls them.

    Args:
        has_gpu: without one, nothing is left out; None: as PyTorch says.
    """
    if not (torch.cuda.is_available() if has_gpu is None else has_gpu):
        return
    compile_as_ever = torch.compile
    torch.compile = _refuse
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_as_ever


def _refuse(*args, **kwargs):
    raise RuntimeError("not compiled")
