"""How are file formats parsed? Into numbered records, one at a time, or what is wrong with them.

JSON Lines, JSON arrays, parquet and text, compressed or not. component/data/source.py validates the records.
"""

import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
import zstandard

PACKED = (".gz", ".xz", ".zst")
ROWS = 32  # of a parquet file decoded at a time: one may be a whole book
CHUNK = 2**16  # bytes read at a time
PACKED_CHUNK = 2**12  # bytes of zstandard unpacked at a time: at most 128 MiB, since 4 bytes can stand for 128 KiB
LONGEST = 2**28  # bytes of a record: a longer one would fill the memory before anything is known about it
TOO_LONG = f"longer than {LONGEST // 2**20} MiB; cut it into several"
BLANKS = re.compile(r"[ \t\r\n]*")  # JSON's white space
# what decompressors and parquet raise for a truncated or damaged file
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError, pyarrow.ArrowException)


@dataclass(frozen=True)
class BadRecord:
    """In place of a record: what is wrong with it."""

    problem: str


class Repeated(tuple):
    """The different values of a key that an object has twice: JSON's parser would keep the last one, in silence."""


def parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's `object_pairs_hook`: an object, in which values that contradict each other are `Repeated`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            kept = found[key]
            if isinstance(kept, Repeated):
                found[key] = Repeated([*kept, value]) if value not in kept else kept
            elif value != kept:
                found[key] = Repeated([value, kept])
    return found


def read_lines(file: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, line) of lines that are not blank, None for one over LONGEST; only \\n ends lines."""
    with _open(file) as lines:
        number = 0
        while line := lines.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                while not line.endswith(b"\n") and (line := lines.readline(CHUNK)):
                    pass
                yield number, None
                continue
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line


def json_lines(file: Path) -> Iterator[tuple[int, object]]:
    return ((number, _parse(line)) for number, line in read_lines(file))


def _parse(line: bytes | None) -> object:
    """The value of a line of JSON, or what is wrong with it."""
    if line is None:
        return BadRecord(TOO_LONG)
    try:
        return json.loads(line.rstrip(b"\r\n").decode(), object_pairs_hook=parse_object)
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 ({error.reason}); convert the file")
    except (ValueError, RecursionError) as error:
        return BadRecord(f"not JSON ({getattr(error, 'msg', error)}, column {getattr(error, 'colno', 1)})")


def _open(file: Path) -> BinaryIO:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(file)  # type: ignore[return-value]
    return io.BufferedReader(_Zstandard(file), CHUNK) if suffix == ".zst" else file.open("rb")


class _Zstandard(io.RawIOBase):
    """Decompresses frame after frame; the package's own reader does not notice a truncated file."""

    def __init__(self, file: Path):
        self.file, self.rest, self.ready = file.open("rb"), b"", memoryview(b"")
        self.frame: Any = None  # the decompressor of a frame that has not ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            packed = self.rest or self.file.read(PACKED_CHUNK)
            if not packed:
                if self.frame is not None:
                    raise EOFError("the file ends inside a zstandard frame")
                return 0
            if self.frame is None:
                self.frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self.ready = memoryview(self.frame.decompress(packed))
            self.rest = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        taken = min(len(buffer), len(self.ready))
        buffer[:taken], self.ready = self.ready[:taken], self.ready[taken:]
        return taken

    def close(self) -> None:
        self.file.close()
        super().close()


def rows(file: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, object]]:
    with pyarrow.parquet.ParquetFile(file) as table:
        # only the requested columns, or all where one is missing, to list what there is
        columns = list(keys) if keys and set(keys) <= set(table.schema_arrow.names) else None
        number = 0
        for batch in table.iter_batches(batch_size=ROWS, columns=columns):
            for row in range(len(batch)):
                number += 1
                try:
                    yield number, batch.slice(row, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield number, BadRecord(f"not UTF-8 ({error.reason}); convert the file")


def whole_text(file: Path, key: str) -> Iterator[tuple[int, object]]:
    with _open(file) as content:
        whole = content.read(LONGEST + 1)
        if len(whole) > LONGEST:
            yield 1, BadRecord(TOO_LONG)
            return
        try:
            text = whole.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield 1, BadRecord(f"not UTF-8 ({error.reason}); convert the file")
            return
    if text.strip():
        yield 1, {key: text}


def is_array(file: Path) -> bool:
    with _open(file) as content:
        return content.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def array(file: Path) -> Iterator[tuple[int, object]]:
    """The elements of a file that is one JSON array, numbered from 1, one in memory at a time."""
    with _open(file) as content:
        decode, characters = (
            json.JSONDecoder(object_pairs_hook=parse_object).raw_decode,
            codecs.getincrementaldecoder("utf-8-sig")(),
        )
        pending, at, number, size, is_end = "", 0, 0, CHUNK, False
        while True:
            mark = BLANKS.match(pending, at).end()  # type: ignore[union-attr]
            start = BLANKS.match(pending, mark + 1).end() if mark < len(pending) else mark  # type: ignore[union-attr]
            before, end = pending[mark : mark + 1], mark if number else start
            if pending[end : end + 1] == "]":
                if pending[end + 1 :].strip() or content.read().strip():
                    raise EOFError(f"there is more text after the array of {number} elements")
                return
            if before and before != ("," if number else "["):
                raise EOFError(f"{before!r} instead of a comma after element {number} of the array")
            try:
                value, end = decode(pending, start)
                if end == len(pending) and not is_end:  # a number may continue
                    raise ValueError("unfinished")
            except (ValueError, RecursionError) as error:
                if is_end:
                    raise EOFError(f"element {number + 1} of the array: {error}") from error
                if len(pending) - at > LONGEST:
                    raise EOFError(f"element {number + 1} of the array is {TOO_LONG}") from error
                part = content.read(size)
                size, is_end = size * 2, not part  # doubled, so that reading an element stays linear
                try:
                    pending, at = pending[at:] + characters.decode(part, final=is_end), 0
                except UnicodeDecodeError as problem:
                    raise EOFError(f"not UTF-8 after element {number} of the array") from problem
                continue
            number, at, size = number + 1, end, CHUNK
            yield number, value
