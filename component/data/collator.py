"""How do samples become a batch? Padding on the right, masked by position.

A pad token is told from a real one by where it stands, not by its value: where pad and end-of-sequence share an id
(LLaMA has no pad token), a genuine end-of-sequence token is still learnt.
"""

import torch
from torch import Tensor

from component.data import IGNORE_INDEX


class RightPadCollator:
    """Samples with `input_ids`, `labels`, and `position_ids` if packed -> tensors (B, T), T the longest of the batch.

    Args:
        pad_token_id: any id of the vocabulary; what stands in padded places is never seen by a real token.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(sample["input_ids"]) for sample in samples)

        def padded(rows, fill: int) -> Tensor:
            return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])

        batch = {
            "input_ids": padded((sample["input_ids"] for sample in samples), self.pad_token_id),
            "attention_mask": padded(([1] * len(sample["input_ids"]) for sample in samples), 0),
            "labels": padded((sample["labels"] for sample in samples), IGNORE_INDEX),
        }
        if "position_ids" in samples[0]:  # of packed rows: padding is one more document
            rows = [[*row, *range(longest - len(row))] for row in (sample["position_ids"] for sample in samples)]
            batch["position_ids"] = torch.tensor(rows)
        return batch
