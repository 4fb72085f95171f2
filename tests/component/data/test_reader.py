"""The same records out of every kind of file, and every way a file can be damaged."""

import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from component.data.reader import BadRecord, Repeated, _Zstandard, array, json_lines
from component.data.source import read_records
from component.error import UserError

RECORDS = [{"text": f"text {number}\nof «Größe» 東京 " + "x" * (number % 50), "id": number} for number in range(2000)]
LINES = "".join(json.dumps(record, ensure_ascii=number % 2 == 0) + "\n" for number, record in enumerate(RECORDS))


def zstd(content: bytes) -> bytes:
    """In two frames, as parallel compressors write it."""
    half = len(content) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))


PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def write_parquet(file, columns: dict) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
@pytest.mark.parametrize("packed", PACKERS)
def test_lines_packed_or_not(tmp_path, kind, packed):
    file = tmp_path / f"data{kind}{packed}"
    file.write_bytes(PACKERS[packed](LINES.encode()))
    assert list(read_records(file, ("text",))) == list(enumerate(RECORDS, 1))


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_array(tmp_path, packed, indent):
    file = tmp_path / f"data.json{packed}"
    file.write_bytes(PACKERS[packed](json.dumps(RECORDS, indent=indent, ensure_ascii=False).encode()))
    assert list(read_records(file, ("text",))) == list(enumerate(RECORDS, 1))


def test_an_array_with_elements_larger_than_what_is_read_at_a_time(tmp_path):
    file = tmp_path / "data.json"
    elements = [{"text": "é" * 200_000}, 17, [], {"text": ""}, 123456]
    file.write_text(json.dumps(elements, ensure_ascii=False), encoding="utf-8")
    assert list(array(file)) == list(enumerate(elements, 1))


def test_arrays_in_an_array_and_none_at_all(tmp_path):
    file = tmp_path / "data.json"
    file.write_text('[[], {"text": "a"}, [["b"]]]\n')
    assert list(array(file)) == [(1, []), (2, {"text": "a"}), (3, [["b"]])]
    file.write_text(" [ ] ")
    assert list(array(file)) == []


def test_parquet(tmp_path):
    file = tmp_path / "data.parquet"
    columns = {"text": [record["text"] for record in RECORDS], "id": [record["id"] for record in RECORDS]}
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=700)
    assert list(read_records(file)) == list(enumerate(RECORDS, 1))
    assert list(read_records(file, ("text",))) == [(n, {"text": r["text"]}) for n, r in enumerate(RECORDS, 1)]


def test_parquet_with_bad_rows(tmp_path):
    file = tmp_path / "data.parquet"
    text = pyarrow.array([b"a", b"\xff", None], type=pyarrow.binary()).view(pyarrow.utf8())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), file)
    first, second, third = read_records(file, ("text",))
    assert first == (1, {"text": "a"})
    assert second == (2, BadRecord("not UTF-8 (invalid start byte); convert the file"))
    assert third == (3, BadRecord('"text" is null, not a text'))
    assert next(read_records(file, ("story",))) == (1, BadRecord('no "story" (its keys: text)'))


@pytest.mark.parametrize("packed", PACKERS)
def test_a_text_file_is_one_text(tmp_path, packed):
    file = tmp_path / f"book.txt{packed}"
    file.write_bytes(PACKERS[packed]("\ufeffOne.\r\n\nTwo: é\n".encode()))
    assert list(read_records(file, ("text",))) == [(1, {"text": "One.\r\n\nTwo: é\n"})]
    assert list(read_records(file, ("story",))) == [(1, {"story": "One.\r\n\nTwo: é\n"})]


BAD_LINES = [
    (b"nonsense", "not JSON (Expecting value, column 1)"),
    (b'{"text": "cut', "not JSON (Unterminated string starting at, column 10)"),
    (b'["a"]', '["a"] is not an object'),
    (b'{"text": "\xe4"}', "not UTF-8 (invalid continuation byte); convert the file"),
    (b'{"text": "a\\ud83d"}', "\"text\" holds half a character, '\\ud83d', at 1; remove it"),
    (b'{"input": "a", "output": "b"}', 'no "text" (its keys: input, output)'),
    (b"{}", 'no "text" (its keys: none)'),
    (b'{"text": 5}', '"text" is 5, not a text'),
    (b'{"text": null}', '"text" is null, not a text'),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
def test_a_bad_line_is_told_and_the_next_one_read(tmp_path, line, problem):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "first"}\n\n' + line + b'\n   \n{"text": "last"}')
    assert list(read_records(file, ("text",))) == [
        (1, {"text": "first"}),
        (3, BadRecord(problem)),
        (5, {"text": "last"}),
    ]


DAMAGED = {
    "cut.jsonl.gz": gzip.compress(LINES.encode())[:-20],
    "cut.jsonl.xz": lzma.compress(LINES.encode())[:-20],
    "cut.jsonl.zst": zstd(LINES.encode())[:-20],
    "no.jsonl.gz": b"no gzip file",
    "no.jsonl.xz": b"no xz file",
    "no.jsonl.zst": b"no zstandard file",
    "no.parquet": b"no parquet file",
    "cut.json": json.dumps(RECORDS).encode()[:-20],
    "binary.json": b'[{"text": "a"}, "\xff"]',
    "two.json": b'[{"text": "a"}]\n[{"text": "b"}]',
    "lines.json": b'[{"text": "a"}]\n{"text": "b"}\n',
    "commas.json": b'[{"text": "a"} {"text": "b"}]',
    "deep.json": b'[{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(DAMAGED[name])
    with pytest.raises(UserError) as refusal:
        list(read_records(file, ("text",)))
    assert str(refusal.value).startswith(f"{file}: truncated, damaged or not readable (")
    assert str(refusal.value).endswith("); download or create it again")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_record_of_any_size_is_a_bad_one(tmp_path, name, monkeypatch):
    """K17: one line of 3 GB in a file of 3 MB; what follows it is read."""
    monkeypatch.setattr("component.data.reader.LONGEST", 1000)
    text = b'{"text": "' + b"a" * 5000 + b'"}\n{"text": "b"}\n'
    packed = {".gz": gzip.compress(text), ".zst": zstandard.compress(text)}.get(name[name.rfind(".") :], text)
    (tmp_path / name).write_bytes(packed)
    found = list(read_records(tmp_path / name, ("text",)))
    assert [number for number, _ in found] == [1, 2]
    assert "cut it into several" in found[0][1].problem
    assert found[1][1] == {"text": "b"}


def test_long_arrays_and_texts(tmp_path, monkeypatch):
    monkeypatch.setattr("component.data.reader.LONGEST", 1000)
    (tmp_path / "a.txt").write_text("a" * 1001)
    ((_, record),) = read_records(tmp_path / "a.txt", ("text",))
    assert "cut it into several" in record.problem
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a" * 200_000}]))
    with pytest.raises(UserError, match="element 1 of the array is longer than"):
        list(read_records(tmp_path / "a.json", ("text",)))


def test_packed_files_are_read_in_linear_time(tmp_path):
    """K17: .zst took more than 100 s for what .gz takes 0.7 s, as all that was unpacked was copied for each line."""
    lines = b'{"text": "abc"}\n' * 400_000
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    reader = _Zstandard(tmp_path / "a.jsonl.zst")
    sizes, buffer = set(), bytearray(2**16)
    while taken := reader.readinto(buffer):
        sizes.add(len(reader.ready))
        assert isinstance(reader.ready, memoryview)  # a view moves on without copying the rest
    assert taken == 0
    assert max(sizes) <= 2**27


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_key_that_is_there_twice(suffix, tmp_path):
    """Equal values say nothing else; of others none is dropped, at any depth."""
    line = '{"a": 1, "a": 2, "b": [{"c": "x", "c": "x", "d": {}, "d": [], "d": {}}], "a": 1}'
    file = tmp_path / f"in{suffix}"
    file.write_text(line if suffix == ".jsonl" else f"[{line}]")
    ((_, found),) = json_lines(file) if suffix == ".jsonl" else array(file)
    assert found == {"a": (2, 1), "b": [{"c": "x", "d": ([], {})}]}
    assert isinstance(found["a"], Repeated)
