"""Which files does a source name, and which of their records are valid?

JSON Lines (`.jsonl`, `.json`, or any other name), a `.json` file that is one array of objects, `.parquet`, and `.txt`
(one text per file, under the key "text"); all but parquet also as `.gz`, `.xz` or `.zst`. An invalid record becomes a
`BadRecord` with the reason; `RecordTally` decides how many are too many. Memory grows with the longest record only.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from component.data.reader import DAMAGE, PACKED, BadRecord, array, is_array, json_lines, rows, whole_text
from component.data.record import chat_problem, ignored_fields, text_fields_problem, text_problem
from component.error import UserError, printable
from component.storage.fingerprint import fingerprint

MAX_FIELDS = 8  # names of unused fields in the summary
MAX_REPORTED = 5  # bad records named one by one; the rest are counted
FOLDER_SUFFIXES = (".parquet", *(f".jsonl{pack}" for pack in ("", *PACKED)))
TEXT_SUFFIXES = tuple(f".txt{pack}" for pack in ("", *PACKED))
Check = Callable[[dict], str | None]


@dataclass
class RecordTally:
    """Counts of records and bad records."""

    total: int = 0
    bad: int = 0
    first: list[str] = field(default_factory=list)  # `file:line: problem` of the first MAX_REPORTED bad ones
    empty: list[str] = field(default_factory=list)  # files without any record
    ignored: Counter = field(default_factory=Counter)  # names of fields that mean nothing to training: records

    def good(
        self, file: Path, records: Iterator[tuple[int, dict | BadRecord]], sft: bool | None = None
    ) -> Iterator[tuple[int, dict]]:
        """The valid records of `file`, each with its number; all are counted, and for training their unread fields."""
        before = self.total
        for number, record in records:
            self.count(file, number, record.problem if isinstance(record, BadRecord) else None)
            if not isinstance(record, BadRecord):
                if sft is not None:
                    self.ignored.update(ignored_fields(record, sft))
                yield number, record
        if self.total == before:
            self.empty.append(str(file))

    def count(self, file: Path | str, number: int, problem: str | None) -> None:
        self.total += 1
        if problem is not None:
            self.bad += 1
            if len(self.first) < MAX_REPORTED:
                self.first.append(printable(f"{file}:{number}: {problem}", 400))

    def reject(self, file: Path | str, number: int, problem: str) -> None:
        """Count a record as bad that was counted as good."""
        self.total -= 1
        self.count(file, number, problem)

    def refuse_if_too_many(self, max_bad_fraction: float = 0.01) -> str:
        """One line about what was skipped, empty if nothing was.

        Raises:
            UserError: there is no record, or more than `max_bad_fraction` of them are bad.
        """
        if self.total == 0:
            raise UserError(f"nothing to read in {', '.join(self.empty) or 'no file'}: no record in it; name another")
        if self.bad > max_bad_fraction * self.total:
            raise UserError(
                f"{self.bad:,} of {self.total:,} lines can't be used, more than max_bad_fraction "
                f"{max_bad_fraction:g} allows; fix them, or raise it:\n  {self._listing()}"
            )
        notes = [f"{self.bad:,} of {self.total:,} lines skipped: {self._listing('; ')}"] if self.bad else []
        notes += [f"nothing in {', '.join(self.empty)}"] if self.empty else []
        if self.ignored:
            names = ", ".join(f"{name} ({count:,})" for name, count in self.ignored.most_common(MAX_FIELDS))
            more = f" and {len(self.ignored) - MAX_FIELDS} more" if len(self.ignored) > MAX_FIELDS else ""
            notes.append(f"fields not used: {names}{more}")
        return "; ".join(notes)

    def _listing(self, separator: str = "\n  ") -> str:
        more = [f"and {self.bad - len(self.first):,} more"] if self.bad > len(self.first) else []
        return separator.join(self.first + more)


def resolve_files(source: str, field: str) -> list[Path]:
    """The files of a path or a hub id; a token file (`.bin`) is a local file.

    Of a folder: its `.jsonl` (compressed or not) and `.parquet` files, sorted, or its `.txt` files if it has none of
    those: a README.txt beside data is no data. For the same reason `.json` files are read only if named.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if source.endswith(".bin"):
        raise UserError(f"{field}: there is no file {source}; name a .bin file of token ids")
    if path.is_dir():
        names = _data_names([entry.name for entry in path.iterdir() if entry.is_file()])
        if not names:
            raise UserError(
                f"{field}: the folder {source} holds no .jsonl file, nor .parquet or .txt; rename the files, "
                "or name one"
            )
        return [path / name for name in names]
    parts = source.split("/")
    if len(parts) < 2 or source.startswith((".", "/", "~")):
        raise UserError(
            f"{field}: there is no file or folder {source}; name one, or owner/dataset/file.jsonl on the hub"
        )
    return [_fetch("/".join(parts[:2]), "/".join(parts[2:]), source, field)]


def texts_fingerprint(source: str | None, field: str) -> str | None:
    """Hash of the files that a local path means, and of no others beside them; None of a hub id, or of nothing."""
    if source is None or not Path(source).exists():
        return None
    prints = [fingerprint(file) for file in resolve_files(source, field)]
    return hashlib.sha256(" ".join(map(str, prints)).encode()).hexdigest()


def _data_names(names: list[str]) -> list[str]:
    names = sorted(name for name in names if not name.startswith("."))
    found = [name for name in names if name.lower().endswith(FOLDER_SUFFIXES)]
    return found or [name for name in names if name.lower().endswith(TEXT_SUFFIXES)]


def _fetch(repository: str, name: str, source: str, field: str) -> Path:
    try:
        if not name:
            names = _data_names(HfApi().list_repo_files(repository, repo_type="dataset"))
            if len(names) != 1:
                listing = ", ".join(names) or "no .jsonl file"
                raise UserError(f"{field}: {source} holds {listing}; name one as {repository}/FILE.jsonl")
            name = names[0]
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except UserError:
        raise
    except Exception as error:  # the hub client has a dozen kinds: offline, not found, gated
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{field}: there is no file {source}, and as a hub id it gave: {reason}") from error


def read_records(
    file: Path, keys: tuple[str, ...] = (), check: Check | None = None
) -> Iterator[tuple[int, dict | BadRecord]]:
    """(number from 1, record or what is wrong with it) of each line, parquet row or text file.

    Args:
        keys: required, with strings as values; a .txt file's text gets the only key.
        check: returns a further problem of a record, or None.

    Raises:
        UserError: the file can't be read, is truncated or damaged.
    """
    name = Path(file.name.lower())
    kind = Path(name.stem).suffix if name.suffix in PACKED else name.suffix
    try:
        if name.suffix == ".parquet":
            found: Iterator[tuple[int, Any]] = rows(file, keys)
        elif kind == ".txt":
            found = whole_text(file, keys[0] if len(keys) == 1 else "text")
        elif kind == ".json" and is_array(file):
            found = array(file)
        else:
            found = json_lines(file)
        for number, record in found:
            problem = None if isinstance(record, BadRecord) else record_problem(record, keys, check)
            yield number, BadRecord(problem) if problem else record
    except DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file}: truncated, damaged or not readable ({reason}); download or create it again"
        ) from error


def read_usable(file: Path, sft: bool) -> Iterator[tuple[int, dict | BadRecord]]:
    """`read_records` with the checks of training: {"text"} lines, or chats if `sft`."""
    if not sft:
        return read_records(file, ("text",), text_fields_problem)
    return read_records(file, check=chat_problem)


def record_problem(record: object, keys: tuple[str, ...], check: Check | None = None) -> str | None:
    if not isinstance(record, dict):
        return f"{json.dumps(record)[:40]} is not an object"
    for key in keys:
        if key not in record:
            return f'no "{key}" (its keys: {", ".join(map(str, record)) or "none"})'
        if problem := text_problem(record[key]):
            return f'"{key}" {problem}'
    return check(record) if check else None
