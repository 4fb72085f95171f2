"""How do samples become a batch? Padded on the right, with positions and shifted labels; of split rows, one part.

Padding is identified by position, not by value: where pad and end-of-sequence share an id (LLaMA has no pad token), a
genuine end-of-sequence token is still trained on.
"""

import torch
from torch import Tensor

from component.data import IGNORE_INDEX
from component.data.skipping import ROWS, row_key


class RightPadCollator:
    """Samples with `input_ids`, `labels`, and `position_ids` if packed -> tensors (B, T), T the longest row.

    A batch holds `input_ids`, `attention_mask` (0 where padded), and
    `position_ids`: a position of 0 starts a document. Padding continues the document of an unpacked row, and is a
        document of its own behind a packed one.
    `labels`: by token, as Hugging Face's models take them.
    `shift_labels`: by the position that predicts, label t + 1 at t, as `labels` can't be shifted once a row is split.

    Args:
        pad_token_id: any id of the vocabulary; no real token sees what stands in padded places.
        part, parts: with sequence parallelism, T is padded to a multiple of `parts`, and a batch holds tokens
            [part T / parts, (part + 1) T / parts) of each row.
        with_rows: a batch also holds `rows`, which `PositionSkipping` reads.
    """

    def __init__(self, pad_token_id: int, part: int = 0, parts: int = 1, with_rows: bool = False):
        self.pad_token_id, self.part, self.parts, self.with_rows = pad_token_id, part, parts, with_rows

    def __call__(self, samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        size = -(-max(len(sample["input_ids"]) for sample in samples) // self.parts)
        longest = self.parts * size

        def padded(rows, fill: int) -> Tensor:
            return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])

        labels = padded((sample["labels"] for sample in samples), IGNORE_INDEX)
        positions = [sample.get("position_ids", []) for sample in samples]
        batch = {
            "input_ids": padded((sample["input_ids"] for sample in samples), self.pad_token_id),
            "attention_mask": padded(([1] * len(sample["input_ids"]) for sample in samples), 0),
            "position_ids": torch.tensor([[*row, *range(longest - len(row))] for row in positions]),
            "labels": labels,
            "shift_labels": torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX),
        }
        batch = {name: rows[:, self.part * size :][:, :size].contiguous() for name, rows in batch.items()}
        if self.with_rows:
            rows = (sample["input_ids"] for sample in samples)
            batch[ROWS] = torch.tensor([(row_key(row), len(row)) for row in rows])
        return batch
