"""Is a merged model the adapter on its base? Their logits side by side, and their perplexities where asked.

The two differ by rounding: the sum of weight and adapter is rounded once to the type of the result, a relative 2^-11
in fp16 and 2^-8 in bf16, where the adapter on its base keeps the two apart.
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

CHECKS = ("auto", "yes", "no", "only")
SHORT = 64  # tokens
TEXT = (
    "A model that was trained on short texts has never seen the positions of a long one. When all positions are "
    "pressed together until they fit, it has to learn to tell neighbours apart that stand closer than before. 1, 2, "
    "3, and so on: every number comes after the one that it comes after. "
)
# the mean difference as a share of the logits' own standard deviation; a forgotten norm or matrix lies far above
BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}
PATIENCE = 5e13  # floating-point operations that a CPU is given without being asked: some minutes on two cores


@dataclass
class Agreement:
    """How far the logits of two models are apart on a text of `tokens` tokens."""

    tokens: int
    largest: float
    mean: float
    spread: float  # the standard deviation of the first one's logits
    same_argmax: float  # share of positions

    def __str__(self) -> str:
        return (
            f"{self.tokens:>7} tokens: logits differ by {self.largest:.2g} at most and {self.mean:.2g} on average "
            f"({self.mean / self.spread:.2%} of their spread); same first choice at {self.same_argmax:.2%}"
        )


@torch.no_grad()
def agreement(first: PreTrainedModel, second: PreTrainedModel, ids: torch.Tensor) -> Agreement:
    """Of two models on one device on `ids` (1, T); logits exist for a chunk of tokens at a time."""
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
    """(1, tokens): the fixed text, as often as it takes."""
    ids: list[int] = tokenizer(TEXT).input_ids
    return torch.tensor([(ids * math.ceil(tokens / len(ids)))[:tokens]])


def check_lengths(plan: MergePlan) -> list[int]:
    """A short text, and as long a one as the merged model is made for."""
    longest = context_length(plan.config)
    return sorted({min(SHORT, longest), longest})


def _needed(plan: MergePlan, tokens: int, dtype: torch.dtype) -> float:
    """Bytes for both models and what they compute on `tokens` tokens, generously."""
    config = plan.config
    wide = 8 * config.hidden_size + 4 * config.intermediate_size
    return 1.1 * dtype.itemsize * (2 * plan.parameters + tokens * wide) + 3 * 4 * min(tokens, 1024) * config.vocab_size


def place_for_check(plan: MergePlan, tokens: int) -> torch.device | None:
    """Where both models fit at once, the GPU first; None where they do not."""
    device = default_device()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if _needed(plan, tokens, inference_dtype(device)) < free:
            return device
    cpu = torch.device("cpu")
    return cpu if _needed(plan, tokens, torch.float32) < psutil.virtual_memory().available else None


def lengths_to_check(plan: MergePlan, check: str, again: str) -> tuple[list[int], torch.device]:
    """The lengths that are checked and where; says what is left out, and with which words it is done later.

    Args:
        check: one of `CHECKS`.
        again: the flags that check what this program is about to write.
    """
    lengths = check_lengths(plan)
    chosen = [] if check == "no" else lengths
    place = place_for_check(plan, lengths[-1])
    if check == "auto" and place is None:
        needed, free = _needed(plan, lengths[-1], torch.float32), psutil.virtual_memory().available
        print(
            f"not checked against the adapter: that takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are "
            f"free; where there is more: python script/merge_lora.py {again} --check only",
            file=sys.stderr,
        )
        chosen = []
    elif check == "auto" and place is not None and place.type == "cpu":
        chosen = [length for length in lengths if 2 * 2 * plan.parameters * length < PATIENCE]
        for length in lengths[len(chosen) :]:
            print(
                f"not checked at {length} tokens, which takes long without a GPU; to do it: "
                f"python script/merge_lora.py {again} --check only",
                file=sys.stderr,
            )
    return chosen, place or default_device()


def check_merged(
    load_adapted: Callable[..., PreTrainedModel],
    load_merged: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    plan: MergePlan,
    lengths: list[int],
    device: torch.device,
) -> list[Agreement]:
    """Print how far the merged model is from the adapter on its base, at each of `lengths` tokens.

    Raises:
        UserError: further than rounding takes it.
    """
    if not lengths:
        return []
    dtype = inference_dtype(device)
    adapted, merged = load_adapted(dtype=dtype, device=device), load_merged(dtype=dtype, device=device)
    bound = max(BOUNDS[dtype], BOUNDS[plan.dtype])
    found = []
    print(f"merged model against the adapter on its base, in {str(dtype).removeprefix('torch.')} on {device.type}:")
    for length in lengths:
        found.append(agreement(adapted, merged, fixed_ids(tokenizer, length).to(device)))
        print(found[-1], flush=True)
    del adapted, merged
    free_memory()
    for result in found:
        if not result.mean <= bound * result.spread:
            raise UserError(
                f"--check: at {result.tokens} tokens the merged model's logits are {result.mean / result.spread:.2%} "
                f"of their spread away from the adapter's, and rounding explains {bound:.1%}; use --dtype float32, "
                "and if that is no nearer, merge with PEFT itself and tell us"
            )
    return found
