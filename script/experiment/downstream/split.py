"""Which questions are about the same document? What one side of a split has read must not be asked on the other."""

import random
from collections import defaultdict

from component.error import UserError

SHARED_LINE = 60  # characters; shorter lines stand in documents that have nothing to do with each other
Record = dict[str, str]


def documents(records: list[Record]) -> list[list[Record]]:
    """The records in groups: two that share a long line are about the same document, and so on along a chain."""
    group = list(range(len(records)))  # the earliest record known to be about the same document, or one on the way

    def first_of(record: int) -> int:
        while group[record] != record:
            record = group[record]
        return record

    seen: dict[str, int] = {}
    for number, record in enumerate(records):
        for line in map(str.strip, record["input"].splitlines()):
            if len(line) >= SHARED_LINE:
                one, other = sorted((first_of(seen.setdefault(line, number)), first_of(number)))
                group[other] = one
    found = defaultdict(list)
    for number, record in enumerate(records):
        found[first_of(number)].append(record)
    return list(found.values())


def split(groups: list[list[Record]], share: float, seed: int) -> dict[str, list[list[Record]]]:
    """{"train", "held_out"}: documents drawn until `share` of all records is held out; none too big for that share."""
    room = share * sum(map(len, groups))
    sides: dict[str, list[list[Record]]] = {"train": [], "held_out": []}
    for group in random.Random(seed).sample(groups, len(groups)):
        is_held_out = len(group) <= room
        room -= len(group) * is_held_out
        sides["held_out" if is_held_out else "train"].append(group)
    if not all(sides.values()):
        raise UserError(f"--held_out: {share} of {len(groups)} documents leaves one side empty; choose another share")
    return sides
