"""Does a merged model equal the adapter on its base? Compares their logits on a fixed text.

They differ only by rounding: the merge rounds the sum of weight and adapter once to the dtype of the result (relative
error 2^-11 in fp16, 2^-8 in bf16), while the unmerged model keeps the two apart.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from component.error import UserError
from component.loading import default_device, free_memory, inference_dtype
from component.loss import chunked_logits
from component.merge.plan import MergePlan
from component.rope import context_length

SHORT = 64  # tokens
TEXT = (
    "A model that was trained on short texts has never seen the positions of a long one. When all positions are "
    "pressed together until they fit, it has to learn to tell neighbours apart that stand closer than before. 1, 2, "
    "3, and so on: every number comes after the one that it comes after. "
)
# mean logit difference as a share of the logits' standard deviation; a missing norm or matrix exceeds it by far
BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}
CPU_FLOPS_LIMIT = 5e13  # of both models per length, for `auto` on a CPU: some minutes on two cores


@dataclass
class Agreement:
    """Difference between the logits of two models on `tokens` tokens."""

    tokens: int
    largest: float
    mean: float
    spread: float  # standard deviation of the first model's logits
    same_argmax: float  # share of positions

    def __str__(self) -> str:
        return (
            f"{self.tokens:>7} tokens: logits differ by {self.largest:.2g} at most and {self.mean:.2g} on average "
            f"({self.mean / self.spread:.2%} of their standard deviation); same top-1 token at {self.same_argmax:.2%}"
        )


@torch.no_grad()
def agreement(first: PreTrainedModel, second: PreTrainedModel, ids: torch.Tensor) -> Agreement:
    """Compare two models on one device on `ids` (1, T), a chunk of logits at a time."""
    largest, gaps, same, count = 0.0, 0.0, 0, 0
    total = square = 0.0
    for ours, theirs in zip(chunked_logits(first, ids), chunked_logits(second, ids), strict=True):
        gap = (ours - theirs).abs()
        if not gap.isfinite().all():
            return Agreement(ids.shape[1], math.inf, math.inf, 1.0, 0.0)
        largest, gaps = max(largest, float(gap.max())), gaps + float(gap.double().sum())
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        total, square = total + float(ours.double().sum()), square + float(ours.double().square().sum())
        count += gap.numel()
    spread = math.sqrt(max(square / count - (total / count) ** 2, 1e-30))
    return Agreement(ids.shape[1], largest, gaps / count, spread, same / ids.shape[1])


def fixed_ids(tokenizer: PreTrainedTokenizerBase, tokens: int) -> torch.Tensor:
    """(1, tokens): a fixed text, repeated as often as needed."""
    ids: list[int] = tokenizer(TEXT).input_ids
    return torch.tensor([(ids * math.ceil(tokens / len(ids)))[:tokens]])


def _needed_bytes(plan: MergePlan, tokens: int, dtype: torch.dtype) -> float:
    """Upper estimate for both models and their activations on `tokens` tokens."""
    config = plan.config
    wide = 8 * config.hidden_size + 4 * config.intermediate_size
    return 1.1 * dtype.itemsize * (2 * plan.parameters + tokens * wide) + 3 * 4 * min(tokens, 1024) * config.vocab_size


def device_for_check(plan: MergePlan, tokens: int) -> torch.device | None:
    """The GPU or else the CPU, whichever holds both models at the same time; None if neither does."""
    device = default_device()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if _needed_bytes(plan, tokens, inference_dtype(device)) < free:
            return device
    cpu = torch.device("cpu")
    return cpu if _needed_bytes(plan, tokens, torch.float32) < psutil.virtual_memory().available else None


def lengths_to_check(plan: MergePlan, check: str, flags: str) -> tuple[list[int], torch.device]:
    """The text lengths to check (short, and the extended context) and the device; prints what is skipped.

    Args:
        check: one of `CHECKS`.
        flags: of the command that checks this merge later, to be printed.
    """
    longest = context_length(plan.config)
    lengths = sorted({min(SHORT, longest), longest})
    chosen = [] if check == "no" else lengths
    device = device_for_check(plan, longest)
    later = f"python script/merge_lora.py {flags} --check only"
    if check == "auto" and device is None:
        needed, free = _needed_bytes(plan, longest, torch.float32), psutil.virtual_memory().available
        print(
            f"not checked against the adapter: the check needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB "
            f"are free; on a larger machine run: {later}",
            file=sys.stderr,
        )
        chosen = []
    elif check == "auto" and device is not None and device.type == "cpu":
        chosen = [length for length in lengths if 2 * 2 * plan.parameters * length < CPU_FLOPS_LIMIT]
        for length in lengths[len(chosen) :]:
            print(f"not checked at {length} tokens, which is slow without a GPU; to check: {later}", file=sys.stderr)
    return chosen, device or default_device()


def check_merged(
    load_adapted: Callable[..., PreTrainedModel],
    load_merged: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    plan: MergePlan,
    lengths: list[int],
    device: torch.device,
) -> list[Agreement]:
    """Compare a merged model with the adapter on its base at each of `lengths` tokens, and print the differences.

    Raises:
        UserError: they differ by more than rounding.
    """
    if not lengths:
        return []
    dtype = inference_dtype(device)
    adapted, merged = load_adapted(dtype=dtype, device=device), load_merged(dtype=dtype, device=device)
    bound = max(BOUNDS[dtype], BOUNDS[plan.dtype])
    found = []
    print(f"merged model and adapter on its base compared in {str(dtype).removeprefix('torch.')} on {device.type}:")
    for length in lengths:
        found.append(agreement(adapted, merged, fixed_ids(tokenizer, length).to(device)))
        print(found[-1], flush=True)
    del adapted, merged
    free_memory()
    for result in found:
        if not result.mean <= bound * result.spread:
            raise UserError(
                f"--check: at {result.tokens} tokens the merged model's logits differ from the adapter's by "
                f"{result.mean / result.spread:.2%} of their standard deviation, and rounding explains {bound:.1%}; "
                "use --dtype float32, and if they still differ, merge with PEFT and report the problem"
            )
    return found
