"""Which texts are chosen? Those whose keyed hashes are lowest.

A text's key is a hash of its own hash and the seed: as random as a draw, but decided by the text alone. The k lowest
keys are therefore a fair sample without replacement that does not depend on the number of processes, on chunks, on
restarts, or on the order of files; equal texts have equal keys, so a duplicate can never be chosen twice. Only keys
and places are kept, of k texts at a time.
"""

import hashlib
import heapq
from collections.abc import Iterable
from typing import TypeVar

import numpy as np

Place = TypeVar("Place")


def text_hash(*texts: str) -> str:
    """32 hexadecimal digits: equal for equal texts."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def sample_key(hashed: str, seed: int, purpose: str = "sample") -> int:
    """128 bits; another purpose is another order."""
    return int.from_bytes(hashlib.blake2b(f"{purpose} {seed} {hashed}".encode(), digest_size=16).digest(), "big")


def lowest(keyed: Iterable[tuple[int, Place]], count: int) -> dict[int, Place]:
    """The places with the `count` lowest keys; of equal keys the first place."""
    chosen: dict[int, Place] = {}
    highest: list[int] = []  # negated keys: the first is the highest chosen one's
    for key, place in keyed:
        if key in chosen or count == 0:
            continue
        if len(highest) < count:
            heapq.heappush(highest, -key)
        elif key < -highest[0]:
            del chosen[-heapq.heappushpop(highest, -key)]
        else:
            continue
        chosen[key] = place
    return chosen


def first_of_each(hashes: Iterable[str], length: int) -> np.ndarray:
    """Whether each of `length` texts is the first of its kind, (length,) bool; in 8 bytes a text, twice to sort."""
    numbers = np.fromiter((int(hashed[:16], 16) for hashed in hashes), dtype=np.uint64, count=length)
    is_first = np.zeros(length, dtype=bool)
    is_first[np.unique(numbers, return_index=True)[1]] = True
    return is_first
