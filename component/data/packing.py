"""How are samples packed into rows? Whole, longest first, each into the fullest row with space for it (best fit).

Positions restart at 0 with each document of a packed row: attention and the groups of S2-Attn stay inside a document,
and its first token is no label. So the loss of a row is the sum over its documents.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

OPEN_ROWS = 16  # kept open while packing a stream


def pack(lengths: np.ndarray, row_tokens: int) -> list[list[int]]:
    """Which documents share a row: best fit decreasing, at most 22 % more rows than the fewest possible.

    Args:
        lengths: tokens of each document, at most `row_tokens`.

    Returns:
        Indices of documents, one list per row; every document is in one row.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens: rows with that many
    rooms: list[int] = []  # the keys of open_rows, sorted
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), row_tokens
            rows.append([])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        rows[row].append(document)
        if room > length:
            if room - length not in open_rows:
                open_rows[room - length] = []
                insort(rooms, room - length)
            open_rows[room - length].append(row)
    return rows


def join(documents: list[dict]) -> dict[str, list[int]]:
    """One row of several samples {"input_ids", "labels"}, with positions that restart at 0 for each."""
    return {
        "input_ids": [token for document in documents for token in document["input_ids"]],
        "labels": [label for document in documents for label in document["labels"]],
        "position_ids": [place for document in documents for place in range(len(document["input_ids"]))],
    }


class PackedRows(TorchDataset):
    """Packed rows of a memory-mapped data set, assembled on access."""

    def __init__(self, documents: Dataset, lengths: np.ndarray, row_tokens: int):
        self.documents = documents
        self.rows = pack(lengths, row_tokens)
        self.fill = int(lengths.sum()) / (len(self.rows) * row_tokens)  # share of places that hold a token

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        found = self.documents[self.rows[row]]
        columns = zip(found["input_ids"], found["labels"], strict=True)
        return join([{"input_ids": ids, "labels": labels} for ids, labels in columns])


def pack_stream(documents: Iterable[dict], row_tokens: int) -> Iterator[dict[str, list[int]]]:
    """Packing of a stream: each document goes into the fullest of OPEN_ROWS rows that has space."""
    rows: list[list[dict]] = []
    sizes: list[int] = []
    for document in documents:
        length = len(document["input_ids"])
        fitting = [row for row, size in enumerate(sizes) if size + length <= row_tokens]
        if fitting:
            row = max(fitting, key=sizes.__getitem__)
            rows[row].append(document)
            sizes[row] += length
        else:
            rows.append([document])
            sizes.append(length)
        if len(rows) > OPEN_ROWS:
            fullest = max(range(len(rows)), key=sizes.__getitem__)
            del sizes[fullest]
            yield join(rows.pop(fullest))
    yield from map(join, rows)
