"""How is an adapter merged into its base? One tensor at a time, so memory does not grow with the model.

y = (W + scaling B A) x in place of W x + scaling B A x: each W is read, changed in fp32, rounded once to the dtype of
the result and written. component/merge/plan.py plans the change of each W.
"""

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from component.error import UserError
from component.merge.plan import MergePlan, TensorUpdate
from component.storage.tensor_writer import write_model

ROWS = 512  # summed at a time


class Scratch:
    """Buffers that are reused for every tensor: allocation would take longer than the addition."""

    def __init__(self) -> None:
        self._bytes: dict[str, torch.Tensor] = {}

    def __call__(self, use: str, size: int) -> torch.Tensor:
        """`size` bytes of the buffer for this use."""
        if use not in self._bytes or len(self._bytes[use]) < size:
            self._bytes.pop(use, None)  # freed before the larger one is allocated
            self._bytes[use] = torch.empty(size, dtype=torch.uint8)
        return self._bytes[use][:size]


def write_merged(folder: Path, plan: MergePlan, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write the merged model into `folder`; configs first, so that errors in them show early.

    Raises:
        UserError: not enough disk space, or weights that are infinite or NaN in the dtype of the result.
    """
    free = shutil.disk_usage(folder).free
    if free < plan.size:
        raise UserError(
            f"--save_path: the weights take {plan.size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on the disk of "
            f"{folder.parent}; name a folder on another disk"
        )
    plan.config.save_pretrained(folder)
    if plan.generation_config is not None:
        plan.generation_config.save_pretrained(folder)
    scratches = itertools.cycle([Scratch(), Scratch()])  # double buffering: one is written while the other is filled
    following = dict(itertools.pairwise(plan.tensors))

    def produce(name: str) -> torch.Tensor:
        if name in following:
            plan.tensors[following[name]].expect()
        return merged_tensor(plan, name, next(scratches))

    with tqdm(total=plan.size, desc="merging", unit="B", unit_scale=True, disable=None) as bar:
        write_model(folder, plan.layout, produce, max_shard_bytes=max_shard_bytes, progress=bar.update)


@contextlib.contextmanager
def variants_on_disk(folder: Path, plans: dict[str, MergePlan], written: str) -> Iterator[dict[str, Path]]:
    """The folder of each plan's merged model: `folder` for the plan `written`, temporary ones for the others."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        folders = {kind: Path(temporary) / kind for kind in plans} | {written: folder}
        for kind, plan in plans.items():
            if kind != written:
                folders[kind].mkdir()
                write_merged(folders[kind], plan)
        yield folders


@torch.no_grad()
def merged_tensor(plan: MergePlan, name: str, scratch: Scratch) -> torch.Tensor:
    """One tensor of the merged model, in `scratch`: valid until the next call with the same scratch.

    Raises:
        UserError: it is infinite or NaN in the dtype of the result.
    """
    change = plan.changes.get(name, TensorUpdate())
    stored = change.trained or plan.tensors[name]
    weight = stored.read(scratch("weight", stored.size))
    if not stored.dtype.is_floating_point:
        return weight
    if name in plan.quantized and change.trained is None:
        weight = nf4_round_trip(weight.to(plan.dtype))
    if change.lora_a is not None and change.lora_b is not None:
        weight = _add_lora(weight, change, plan.dtype, scratch)
    weight = weight.to(plan.dtype)
    if not all(bound.isfinite() for bound in weight.aminmax()):
        raise UserError(
            f"{name} is infinite or NaN in {str(plan.dtype).removeprefix('torch.')}; use --dtype bfloat16 or float32; "
            "if that does not help, the adapter is damaged"
        )
    return weight


def _add_lora(weight: torch.Tensor, change: TensorUpdate, dtype: torch.dtype, scratch: Scratch) -> torch.Tensor:
    """W + scaling B A (out, in), summed in fp32 and rounded once; in fp32 bit-identical to PEFT's merge."""
    assert change.lora_a is not None
    assert change.lora_b is not None
    a, b = change.lora_a.read().float(), change.lora_b.read().float()
    size = weight.numel() * torch.float32.itemsize
    total = torch.mm(b, a, out=scratch("sum", size).view(torch.float32).reshape(b.shape[0], a.shape[1]))
    total *= change.scaling
    total = total.t() if change.is_embedding else total
    # in place if the dtypes have the same size
    result = weight.view(dtype) if weight.dtype.itemsize == dtype.itemsize else torch.empty(weight.shape, dtype=dtype)
    for rows in torch.arange(weight.shape[0]).split(ROWS):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        total[part] += weight[part].float()
        result[part] = total[part]
    return result


def nf4_round_trip(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as QLoRA training uses it: quantized to NF4 (blocks of 64, double quantization) and dequantized."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).reshape(weight.shape)
