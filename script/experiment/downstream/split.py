"""Which questions are about the same document, so that no document is both trained on and held out?"""

import random
from collections import defaultdict

from component.error import UserError

SHARED_LINE = 60  # characters; shorter lines also occur in unrelated documents
Record = dict[str, str]


def documents(records: list[Record]) -> list[list[Record]]:
    """Group the records by document (union-find): two that share a long line are about the same one."""
    group = list(range(len(records)))  # parent: an earlier record about the same document

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
    """{"train", "held_out"}: random documents, held out as long as they fit into `share` of all records."""
    room = share * sum(map(len, groups))
    sides: dict[str, list[list[Record]]] = {"train": [], "held_out": []}
    for group in random.Random(seed).sample(groups, len(groups)):
        is_held_out = len(group) <= room
        room -= len(group) * is_held_out
        sides["held_out" if is_held_out else "train"].append(group)
    if not all(sides.values()):
        raise UserError(f"--held_out: {share} of {len(groups)} documents leaves one side empty; use another share")
    return sides
