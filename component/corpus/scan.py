"""How are all input records measured in one resumable pass?

The first line of the journal beside the output holds everything that results depend on (settings, tokenizer, sizes and
times of the files), each further line one chunk of records in input order. A run that finds its own journal resumes
after the last complete line; results do not depend on chunk borders, so they equal those of an uninterrupted run.
Samples are chosen from the journal too: memory holds a few chunks and counts, whatever the input's size.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from component.corpus.pool import in_order
from component.data.reader import BadRecord
from component.data.source import MAX_REPORTED, RecordTally, read_records
from component.error import UserError

JOURNAL_FORMAT = 1
CHUNK_RECORDS, CHUNK_CHARACTERS = 256, 2**20  # a chunk ends with the record that reaches either
Chunk = list[tuple[int, dict | BadRecord]]
Row = tuple[int, int, int, int, str]  # record number, first and end character, tokens, hash of the text


@dataclass
class SourceFile:
    path: Path
    keys: tuple[str, ...] = ()  # required of a record, others are removed; empty: all are kept
    group: int = 0  # index of its source in a mixture


@dataclass
class ScannedChunk:
    """The result for one chunk."""

    rows: list[Row] = field(default_factory=list)  # candidates
    noted: Counter = field(default_factory=Counter)  # counts of other outcomes, such as too_short
    bad: list[tuple[int, str]] = field(default_factory=list)  # record number, problem


Measure = Callable[[int, Chunk], ScannedChunk]  # of a group and a chunk of its records


@dataclass
class FileCount:
    read: int = 0
    bad: int = 0
    kept: int = 0  # rows
    noted: Counter = field(default_factory=Counter)


@dataclass
class Place:
    """The location of a chosen record."""

    file: int
    number: int  # of the record


Chosen = TypeVar("Chosen", bound=Place)


class Scan:
    """The scanned files: counts in memory, rows in the journal."""

    def __init__(self, journal: Path, files: list[SourceFile]):
        self.journal, self.files = journal, files
        self.counts = [FileCount() for _ in files]
        self.first_bad: list[str] = []
        self.at = (0, 0)  # the journal's last file and record number
        self.is_done = False

    def take_in(self, line: dict) -> None:
        if line.get("done"):
            self.is_done = True
            return
        count = self.counts[line["file"]]
        count.read += line["read"]
        count.bad += line["bad"]
        count.kept += len(line["rows"])
        count.noted.update(line["noted"])
        path = self.files[line["file"]].path
        self.first_bad += [f"{path}:{number}: {problem}" for number, problem in line["problems"]]
        del self.first_bad[MAX_REPORTED:]
        self.at = (line["file"], line["last"])

    def rows(self) -> Iterator[tuple[int, Row]]:
        """(file index, row) in input order."""
        with self.journal.open(encoding="utf-8") as lines:
            next(lines)
            for text in lines:
                line = json.loads(text)
                for row in line.get("rows", ()):
                    yield line["file"], tuple(row)

    def reread(self, places: Iterable[Chosen]) -> Iterator[tuple[Chosen, dict | BadRecord]]:
        """Each of `places`, given in input order, with its record, read again.

        Raises:
            UserError: a record is no longer there.
        """
        waiting = iter(places)
        place = next(waiting, None)
        for index, file in enumerate(self.files):
            if place is None or place.file != index:
                continue
            for number, record in read_records(file.path, file.keys):
                while place is not None and (place.file, place.number) == (index, number):
                    yield place, record
                    place = next(waiting, None)
                if place is None or place.file != index:
                    break
        if place is not None:
            raise self.changed(place)

    def changed(self, place: Place) -> UserError:
        """The error for a record that changed after the scan; the journal is removed, as it is of no more use."""
        self.journal.unlink(missing_ok=True)
        return UserError(
            f"{self.files[place.file].path}:{place.number}: changed while it was read; run the command again"
        )

    def tally(self) -> RecordTally:
        empty = [str(file.path) for file, count in zip(self.files, self.counts, strict=True) if not count.read]
        read, bad = (sum(getattr(count, name) for count in self.counts) for name in ("read", "bad"))
        return RecordTally(read, bad, self.first_bad, empty)


def scan_files(
    journal: Path, files: list[SourceFile], settings: dict, measure: Measure, *, num_proc: int, overwrite: bool = False
) -> Scan:
    """Measure every record of `files`, resuming an interrupted run with the same settings.

    Args:
        settings: everything that `measure` depends on, as JSON.
        num_proc: processes; 1 measures in this process.
        overwrite: start over if the journal is of other settings or files.

    Raises:
        UserError: the journal belongs to another run, a file can't be read, a process was killed.
    """
    scan = Scan(journal, files)
    head = {"format": JOURNAL_FORMAT, "settings": settings, "files": [stamp(file) for file in files]}
    _take_up(scan, head, overwrite)
    if scan.is_done:
        return scan
    with journal.open("a", encoding="utf-8") as out, tqdm(desc="scanning", unit=" texts", smoothing=0.05) as bar:
        bar.update(sum(count.read for count in scan.counts))

        def work(item: tuple[int, Chunk]) -> ScannedChunk:
            return measure(files[item[0]].group, item[1])

        for (index, chunk), measured in in_order(work, _chunks(files, scan.at), num_proc):
            line = {
                "file": index,
                "last": chunk[-1][0],
                "read": len(chunk),
                "bad": len(measured.bad),
                "problems": measured.bad[:MAX_REPORTED],
                "noted": dict(measured.noted),
                "rows": measured.rows,
            }
            _write_line(out, line)
            scan.take_in(line)
            bar.update(len(chunk))
        _write_line(out, {"done": True})
    return scan


def stamp(file: SourceFile) -> dict:
    status = file.path.stat()
    return {"path": str(file.path), "bytes": status.st_size, "changed": status.st_mtime_ns, "keys": list(file.keys)}


def _write_line(out, line: dict) -> None:
    out.write(json.dumps(line, separators=(",", ":")) + "\n")
    out.flush()  # flushed to the system: a killed process loses nothing


def _take_up(scan: Scan, head: dict, overwrite: bool) -> None:
    """Load the journal of an interrupted run up to its last complete line, or start a new one."""
    journal = scan.journal
    if journal.is_file():
        with journal.open("rb") as lines:
            found = _whole_line(next(lines, b""))
            whole = lines.tell()
            if found == head:
                while (text := lines.readline()) and (line := _whole_line(text)) is not None:
                    scan.take_in(line)
                    whole = lines.tell()
        if found == head:
            os.truncate(journal, whole)
            read = sum(count.read for count in scan.counts)
            print(f"resuming an interrupted run after {read:,} texts ({journal})", flush=True)
            return
        if found is not None and not overwrite:
            raise UserError(
                f"{journal} belongs to an unfinished run with another {_difference(found, head)}; finish that run "
                "with its own flags and files, or start over with --overwrite"
            )
    with journal.open("w", encoding="utf-8") as out:
        _write_line(out, head)


def _whole_line(text: bytes) -> dict | None:
    if not text.endswith(b"\n"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def _difference(found: dict, head: dict) -> str:
    old, new = found.get("settings", {}), head["settings"]
    names = [f"{name} ({old.get(name)}, now {value})" for name, value in new.items() if old.get(name) != value]
    return ", ".join(names) or "list of input files, or files that have changed since"


def _chunks(files: list[SourceFile], at: tuple[int, int]) -> Iterator[tuple[int, Chunk]]:
    """The records after file and number `at`, in chunks of one file each."""
    for index in range(at[0], len(files)):
        file, chunk, size = files[index], [], 0
        for number, record in read_records(file.path, file.keys):
            if index == at[0] and number <= at[1]:
                continue
            if file.keys and isinstance(record, dict):
                record = {key: record[key] for key in file.keys}
            chunk.append((number, record))
            size += _characters(record)
            if len(chunk) >= CHUNK_RECORDS or size >= CHUNK_CHARACTERS:
                yield index, chunk
                chunk, size = [], 0
        if chunk:
            yield index, chunk


def _characters(value: object) -> int:
    """Approximate size of a record."""
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 8
