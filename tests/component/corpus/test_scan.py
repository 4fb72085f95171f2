"""Each record is measured once: rows and counts written out, and a journal that a killed run goes on behind."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from component.corpus.scan import Chunk, Place, Scan, ScannedChunk, SourceFile, scan_files
from component.data.reader import BadRecord
from component.error import UserError
from tests.words import write_lines

SETTINGS = {"max_tokens": 3}


class Lengths:
    """Measures texts by their characters; notes the numbers of the records it was given."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, group: int, chunk: Chunk) -> ScannedChunk:
        measured = ScannedChunk()
        for number, record in chunk:
            self.seen.append(number)
            if isinstance(record, BadRecord):
                measured.bad.append((number, record.problem))
            elif len(record["text"]) > 3:
                measured.noted["too_long"] += 1
            else:
                size = len(record["text"])
                measured.rows.append((number, 0, size, size + 10 * group, record["text"]))
        return measured


@pytest.fixture
def files(tmp_path) -> list[SourceFile]:
    first = write_lines(tmp_path / "1.jsonl", *({"text": text, "id": 1} for text in ("a", "bb", "cccc")))
    second = write_lines(tmp_path / "2.jsonl", {"text": "ddd"}, {"txt": "e"}, {"text": "ffff"})
    return [SourceFile(first, ("text",)), SourceFile(second, ("text",), group=1)]


ROWS = [(0, (1, 0, 1, 1, "a")), (0, (2, 0, 2, 2, "bb")), (1, (1, 0, 3, 13, "ddd"))]


def scanned(tmp_path: Path, files: list[SourceFile], measure=None, settings=None, **options) -> Scan:
    return scan_files(
        tmp_path / "out.journal", files, settings or SETTINGS, measure or Lengths(), num_proc=1, **options
    )


def check(scan: Scan) -> None:
    assert list(scan.rows()) == ROWS
    assert [(count.read, count.bad, count.kept) for count in scan.counts] == [(3, 0, 2), (3, 1, 1)]
    assert [count.noted for count in scan.counts] == [Counter(too_long=1), Counter(too_long=1)]
    assert scan.tally().total == 6
    assert [problem.split("/")[-1] for problem in scan.first_bad] == ['2.jsonl:2: no "text" (its keys: txt)']


@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_what_is_measured(chunk, files, tmp_path, monkeypatch):
    monkeypatch.setattr("component.corpus.scan.CHUNK_RECORDS", chunk)
    check(scanned(tmp_path, files))


def test_several_processes_measure_the_same(files, tmp_path, monkeypatch):
    monkeypatch.setattr("component.corpus.scan.CHUNK_RECORDS", 1)
    check(scan_files(tmp_path / "out.journal", files, SETTINGS, Lengths(), num_proc=2))


@pytest.mark.parametrize("cut", [0, 1, 40])
@pytest.mark.parametrize("lines", range(1, 7))
def test_a_killed_run_goes_on_behind_its_last_whole_line(lines, cut, files, tmp_path, monkeypatch, capsys):
    """However many chunks it had written, and however much of the next one."""
    monkeypatch.setattr("component.corpus.scan.CHUNK_RECORDS", 1)
    scanned(tmp_path, files)
    journal = tmp_path / "out.journal"
    whole = journal.read_bytes()
    kept = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join(kept[:lines]) + kept[lines][:cut])
    measure = Lengths()
    check(scanned(tmp_path, files, measure))
    assert measure.seen == [1, 2, 3, 1, 2, 3][lines - 1 :]
    assert journal.read_bytes() == whole
    assert f"after {lines - 1} texts" in capsys.readouterr().out


def test_a_finished_run_measures_nothing(files, tmp_path):
    scanned(tmp_path, files)
    measure = Lengths()
    check(scanned(tmp_path, files, measure))
    assert measure.seen == []


def test_another_run_is_not_gone_on_with(files, tmp_path):
    scanned(tmp_path, files)
    with pytest.raises(UserError, match=r"another max_tokens \(3, now 4\); finish .* --overwrite"):
        scanned(tmp_path, files, settings={"max_tokens": 4})
    os.utime(files[0].path, ns=(1, 1))
    with pytest.raises(UserError, match="list of input files, or files that have changed"):
        scanned(tmp_path, files)
    measure = Lengths()
    check(scanned(tmp_path, files, measure, overwrite=True))
    assert len(measure.seen) == 6


@pytest.mark.parametrize("text", ["", "{", "nonsense\n"])
def test_what_is_no_journal_is_begun_anew(text, files, tmp_path):
    (tmp_path / "out.journal").write_text(text)
    check(scanned(tmp_path, files))
    assert json.loads((tmp_path / "out.journal").read_text().splitlines()[0])["settings"] == SETTINGS


def test_measures_of_changed_files_are_of_no_more_use(files, tmp_path):
    scan = scanned(tmp_path, files)
    assert str(scan.changed(Place(1, 3))) == f"{files[1].path}:3: changed while it was read; run the command again"
    assert not (tmp_path / "out.journal").exists()
