"""How are texts sampled? The k with the lowest keyed hashes (bottom-k sampling).

A text's key is a hash of the text and the seed. The k lowest keys are a uniform sample without replacement that does
not depend on the number of processes, chunk borders, restarts, or the order of files; equal texts have equal keys, so
no duplicate is chosen twice. Memory holds the keys and places of k texts.
"""

import hashlib
import heapq
from collections.abc import Iterable
from typing import TypeVar

import numpy as np

Place = TypeVar("Place")


def text_hash(*texts: str) -> str:
    """32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def sample_key(hashed: str, seed: int, purpose: str = "sample") -> int:
    """128 bits; independent for another purpose."""
    return int.from_bytes(hashlib.blake2b(f"{purpose} {seed} {hashed}".encode(), digest_size=16).digest(), "big")


def lowest(keyed: Iterable[tuple[int, Place]], count: int) -> dict[int, Place]:
    """The places with the `count` lowest keys; for equal keys the first place."""
    chosen: dict[int, Place] = {}
    highest: list[int] = []  # negated keys: a max-heap of the chosen ones
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
    """(length,) bool, False for duplicates of an earlier text; takes 8 bytes per text, 16 while sorting."""
    numbers = np.fromiter((int(hashed[:16], 16) for hashed in hashes), dtype=np.uint64, count=length)
    is_first = np.zeros(length, dtype=bool)
    is_first[np.unique(numbers, return_index=True)[1]] = True
    return is_first
