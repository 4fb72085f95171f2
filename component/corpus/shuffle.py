"""How are lines written in another order than they are read?"""

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm


def write_shuffled(file: Path, lines: Iterable[tuple[int, str]], count: int) -> None:
    """Write `lines`, given in input order, in the order of their keys, with one of them in memory at a time."""
    ordered, places, at = file.with_name(f"{file.name}.ordered"), [], 0
    try:
        with ordered.open("wb") as writing:
            for key, text in tqdm(lines, total=count, desc="writing", unit=" texts"):
                line = text.encode()
                writing.write(line)
                places.append((key, at, len(line)))
                at += len(line)
        with ordered.open("rb") as reading, file.open("wb") as shuffled:
            for _, start, length in sorted(places):
                reading.seek(start)
                shuffled.write(reading.read(length))
    finally:
        ordered.unlink(missing_ok=True)
