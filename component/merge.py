"""How is an adapter merged into its base? One tensor in memory at a time, whatever the model's size.

y = (W + scaling B A) x in place of W x + scaling B A x: each W is read, changed in fp32, rounded once to the type of
the result, written and forgotten. component/merge_plan.py says what is done to which W.
"""

import shutil
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from component.error import UserError
from component.merge_plan import Change, MergePlan
from component.shard import write_model


def write_merged(
    folder: Path, plan: MergePlan, tokenizer: PreTrainedTokenizerBase, *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """The merged model as a plain model folder; small files first, so that what they get wrong costs no time.

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
    tokenizer.save_pretrained(folder)
    with tqdm(total=plan.size, desc="merging", unit="B", unit_scale=True) as bar:
        write_model(
            folder,
            plan.layout,
            lambda name: merged_tensor(plan, name),
            max_shard_bytes=max_shard_bytes,
            progress=bar.update,
        )


@torch.no_grad()
def merged_tensor(plan: MergePlan, name: str) -> torch.Tensor:
    """One tensor of the merged model.

    Raises:
        UserError: it is infinite or no number in the result's type.
    """
    stored, change = plan.tensors[name], plan.changes.get(name, Change())
    weight = (change.trained or stored).read()
    if not stored.dtype.is_floating_point:
        return weight
    if name in plan.quantised and change.trained is None:
        weight = nf4_round_trip(weight.to(plan.dtype))
    if change.lora_a is not None and change.lora_b is not None:
        a, b = change.lora_a.read().float(), change.lora_b.read().float()
        # in PEFT's order, to the last bit in fp32
        delta = (b @ a).t() if change.is_embedding else b @ a
        delta *= change.scaling
        weight = weight.float()
        weight += delta
    weight = weight.to(plan.dtype)
    if not all(bound.isfinite() for bound in weight.aminmax()):
        raise UserError(
            f"{name} becomes infinite or no number in {str(plan.dtype).removeprefix('torch.')}: use --dtype bfloat16 "
            "or float32, and if that does not help, the adapter is broken"
        )
    return weight


def nf4_round_trip(weight: torch.Tensor) -> torch.Tensor:
    """What QLoRA's training computes with in the place of `weight`: NF4 in blocks of 64, scales quantised as well."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).reshape(weight.shape)
