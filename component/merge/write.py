"""How is an adapter merged into its base? One tensor at a time, so memory does not grow with the model.

y = (W + scaling B A) x in place of W x + scaling B A x, with DoRA's trained length of each row: each W is read,
changed in fp32, rounded once to the dtype of the result and written. component/merge/plan.py plans the changes.
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
from component.merge.serving import add_legacy_keys
from component.storage.tensor_reader import is_finite
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
    add_legacy_keys(folder)
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
    if not is_finite(weight):
        raise UserError(_not_finite(name, plan, change))
    return weight


def _not_finite(name: str, plan: MergePlan, change: TensorUpdate) -> str:
    """Which file holds what is infinite or NaN, if one does."""
    parts = (change.trained or plan.tensors[name], change.lora_a, change.lora_b, change.magnitude)
    for stored in parts:
        if stored is not None and not is_finite(stored.read()):
            return f"{stored.file}: {stored.name} holds infinite or NaN values; download or train it again"
    return (
        f"{name} is infinite or NaN in {str(plan.dtype).removeprefix('torch.')}; use --dtype bfloat16 or float32; "
        "if that does not help, the adapter is damaged"
    )


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
    for start in range(0, weight.shape[0], ROWS):
        part = slice(start, start + ROWS)
        total[part] += weight[part].float()
        if change.magnitude is None:
            result[part] = total[part]
    if change.magnitude is not None:
        result.copy_(total.mul_(_dora_factor(total, change.magnitude.read().float(), change.is_embedding)))
    return result


def _dora_factor(total: torch.Tensor, magnitude: torch.Tensor, is_embedding: bool) -> torch.Tensor:
    """What each row of W + scaling B A is multiplied by to get its trained length (DoRA, arXiv 2402.09353, eq. 5).

    Args:
        total: (out, in); of an embedding (tokens, dimension), where PEFT takes the length of each column.

    Returns:
        (out, 1), or (1, dimension).
    """
    axis = 0 if is_embedding else 1
    return magnitude.reshape(-1).div(torch.linalg.vector_norm(total, dim=axis)).unsqueeze(axis)


def nf4_round_trip(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as QLoRA training uses it: quantized to NF4 (blocks of 64, double quantization) and dequantized."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).reshape(weight.shape)
