"""Which positions do a training row's tokens get if some are skipped? PoSE, arXiv 2309.10400, section 3.2.

A row of l tokens is cut in two chunks (the paper's N = 2) at a random place; the second one's positions move up by a
random skip of at most context - l. So short rows show the model all distances of the context:

    token       0   1   2   3   4   5   6
    position    0   1   2  11  12  13  14        l = 7, cut at 3, skip 8; a context of at least 15 tokens

Who attends to whom stays as it is: it depends on places in the row, and only a position of 0 starts a document. The
text of the two chunks is contiguous (v = 0 in the paper, whose appendix A finds that this matters little), so samples
are the same with and without skips.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROWS = "rows"  # (B, 2): key and length of each whole row


def row_key(input_ids: list[int]) -> int:
    """63 bits that stand for a row's tokens, whichever process reads it, in whichever batch."""
    digest = hashlib.blake2b(np.asarray(input_ids, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class PositionSkipping(NamedTuple):
    """Cuts and skips that depend on the seed, the step and the row's tokens only.

    So a row that comes again gets other positions, and a run has the same ones after it was resumed, and for any
    number of processes and size of a batch.
    """

    context: int  # tokens whose positions are covered
    seed: int

    def draw(self, key: int, length: int, step: int) -> tuple[int, int]:
        """(where the second chunk begins, its skip), both uniform, for a row of `length` tokens."""
        digest = hashlib.blake2b(f"{self.seed} {step} {key}".encode(), digest_size=16).digest()
        cut, skip = (int.from_bytes(part, "little") for part in (digest[:8], digest[8:]))
        return 1 + cut % max(length - 1, 1), skip % (self.context - length + 1)

    def apply(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """A batch of unpacked rows, or of this process's part of them, with skipped positions and without `ROWS`.

        Args:
            batch: of a `RightPadCollator` with `with_rows`.
            step: number of optimizer steps before this one.
        """
        positions = batch["position_ids"]
        drawn = [self.draw(key, length, step) for key, length in batch[ROWS].tolist()]
        cut, skip = torch.tensor(drawn, device=positions.device).split(1, dim=1)
        others = {name: tensor for name, tensor in batch.items() if name != ROWS}
        return others | {"position_ids": positions + skip * (positions >= cut)}
