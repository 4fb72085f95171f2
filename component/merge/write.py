"""How is an adapter merged into its base? Two tensors in memory at most, whatever the model's size.

y = (W + scaling B A) x in place of W x + scaling B A x: each W is read, changed in fp32, rounded once to the type of
the result, written and forgotten. component/merge/plan.py says what is done to which W.
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

ROWS = 512  # that are summed at a time


class Scratch:
    """Memory that is used again for every tensor: to get new memory and give it back takes longer than to add."""

    def __init__(self) -> None:
        self._bytes: dict[str, torch.Tensor] = {}

    def __call__(self, use: str, size: int) -> torch.Tensor:
        """`size` bytes, the same ones for the same use."""
        if use not in self._bytes or len(self._bytes[use]) < size:
            self._bytes.pop(use, None)  # before the larger piece is taken
            self._bytes[use] = torch.empty(size, dtype=torch.uint8)
        return self._bytes[use][:size]


def write_merged(folder: Path, plan: MergePlan, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """The merged model into `folder`; small files first, so that what they get wrong costs no time.

    Raises:
        UserError: not enough room on the disk, or weights that are infinite or no numbers in the result's type.
    """
    free = shutil.disk_usage(folder).free
    if free < plan.size:
        raise UserError(
            f"--save_path: {plan.size / 1e9:.1f} GB of weights, but {free / 1e9:.1f} GB are free on the disk of "
            f"{folder.parent}; name a folder on another"
        )
    plan.config.save_pretrained(folder)
    if plan.generation_config is not None:
        plan.generation_config.save_pretrained(folder)
    scratches = itertools.cycle([Scratch(), Scratch()])  # one is written from while the other is filled
    coming = dict(zip(plan.tensors, [*plan.tensors][1:], strict=False))

    def produce(name: str) -> torch.Tensor:
        if name in coming:
            plan.tensors[coming[name]].expect()
        return merged_tensor(plan, name, next(scratches))

    with tqdm(total=plan.size, desc="merging", unit="B", unit_scale=True) as bar:
        write_model(folder, plan.layout, produce, max_shard_bytes=max_shard_bytes, progress=bar.update)


@contextlib.contextmanager
def variants_on_disk(folder: Path, plans: dict[str, MergePlan], written: str) -> Iterator[dict[str, Path]]:
    """Folders of the merged models of all `plans`, of which `folder` is that of `written`; for as long as it takes."""
    with tempfile.TemporaryDirectory(dir=folder) as spare:
        folders = {kind: Path(spare) / kind for kind in plans} | {written: folder}
        for kind, plan in plans.items():
            if kind != written:
                folders[kind].mkdir()
                write_merged(folders[kind], plan)
        yield folders


@torch.no_grad()
def merged_tensor(plan: MergePlan, name: str, scratch: Scratch) -> torch.Tensor:
    """One tensor of the merged model, in `scratch`: the next one made there takes its place.

    Raises:
        UserError: it is infinite or no number in the result's type.
    """
    change = plan.changes.get(name, TensorUpdate())
    stored = change.trained or plan.tensors[name]
    weight = stored.read(scratch("weight", stored.size))
    if not stored.dtype.is_floating_point:
        return weight
    if name in plan.quantised and change.trained is None:
        weight = nf4_round_trip(weight.to(plan.dtype))
    if change.lora_a is not None and change.lora_b is not None:
        weight = _add_lora(weight, change, plan.dtype, scratch)
    weight = weight.to(plan.dtype)
    if not all(bound.isfinite() for bound in weight.aminmax()):
        raise UserError(
            f"{name} becomes infinite or no number in {str(plan.dtype).removeprefix('torch.')}: use --dtype bfloat16 "
            "or float32, and if that does not help, the adapter is broken"
        )
    return weight


def _add_lora(weight: torch.Tensor, change: TensorUpdate, dtype: torch.dtype, scratch: Scratch) -> torch.Tensor:
    """W + scaling B A (out, in), summed in fp32 and rounded once; in PEFT's order, to the last bit in fp32."""
    assert change.lora_a is not None
    assert change.lora_b is not None
    a, b = change.lora_a.read().float(), change.lora_b.read().float()
    size = weight.numel() * torch.float32.itemsize
    total = torch.mm(b, a, out=scratch("sum", size).view(torch.float32).reshape(b.shape[0], a.shape[1]))
    total *= change.scaling
    total = total.t() if change.is_embedding else total
    # where W's own room will do, the result goes there
    result = weight.view(dtype) if weight.dtype.itemsize == dtype.itemsize else torch.empty(weight.shape, dtype=dtype)
    for rows in torch.arange(weight.shape[0]).split(ROWS):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        total[part] += weight[part].float()
        result[part] = total[part]
    return result


def nf4_round_trip(weight: torch.Tensor) -> torch.Tensor:
    """What QLoRA's training computes with in the place of `weight`: NF4 in blocks of 64, scales quantised as well."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).reshape(weight.shape)
