"""Where do texts come from? The same records out of every kind of file, and every way a file can be wrong."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from component.data.reader import BadRecord
from component.data.source import RecordTally, read_records, resolve_files, texts_fingerprint
from component.error import UserError

RECORDS = [{"text": f"text {number}\nof «Größe» 東京 " + "x" * (number % 50), "id": number} for number in range(2000)]
LINES = "".join(json.dumps(record, ensure_ascii=number % 2 == 0) + "\n" for number, record in enumerate(RECORDS))


def zstd(content: bytes) -> bytes:
    """In two frames, as parallel compressors write it."""
    half = len(content) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))


def write_parquet(file, columns: dict) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def test_what_else_is_asked_of_a_record(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n{"text": "bb"}\n')
    found = list(read_records(file, ("text",), lambda record: "too long" if len(record["text"]) > 1 else None))
    assert found == [(1, {"text": "a"}), (2, BadRecord("too long"))]


def tally_of(tmp_path, *contents: str) -> tuple[RecordTally, list]:
    tally, good = RecordTally(), []
    for at, content in enumerate(contents):
        file = tmp_path / f"{at}.jsonl"
        file.write_text(content)
        good += tally.good(file, read_records(file, ("text",)))
    return tally, good


def test_a_few_bad_records_are_left_out_and_told(tmp_path):
    tally, good = tally_of(tmp_path, '{"text": "a"}\n' * 299 + "bad\n", "\n")
    assert (len(good), tally.total, tally.bad) == (299, 300, 1)
    first = f"{tmp_path}/0.jsonl:300: not JSON (Expecting value, column 1)"
    assert tally.refuse_if_too_many() == f"1 of 300 lines skipped: {first}; nothing in {tmp_path}/1.jsonl"
    with pytest.raises(UserError, match=r"1 of 300 lines can't be used, more than max_bad_fraction 0\.003 allows"):
        tally.refuse_if_too_many(0.003)


def test_bad_records_at_the_limit_are_tolerated(tmp_path):
    tally, _ = tally_of(tmp_path, '{"text": "a"}\n' * 99 + "bad\n")
    assert tally.refuse_if_too_many(0.01).startswith("1 of 100 lines skipped")


def test_many_bad_records_are_refused_and_the_first_five_named(tmp_path):
    tally, _ = tally_of(tmp_path, '{"text": "a"}\n' + "bad\n" * 6, '{"input": "a"}\n')
    with pytest.raises(UserError) as refusal:
        tally.refuse_if_too_many()
    lines = [f"  {tmp_path}/0.jsonl:{number}: not JSON (Expecting value, column 1)" for number in range(2, 7)]
    heading = "7 of 8 lines can't be used, more than max_bad_fraction 0.01 allows; fix them, or raise it:"
    assert str(refusal.value).splitlines() == [heading, *lines, "  and 2 more"]


def test_nothing_at_all(tmp_path):
    tally, _ = tally_of(tmp_path, "", "\n \n")
    with pytest.raises(UserError) as refusal:
        tally.refuse_if_too_many()
    assert (
        str(refusal.value)
        == f"nothing to read in {tmp_path}/0.jsonl, {tmp_path}/1.jsonl: no record in it; name another"
    )


def names_in(folder) -> list[str]:
    return [file.name for file in resolve_files(str(folder), "--source")]


def test_files_of_a_folder(tmp_path):
    for name in (
        "b.jsonl",
        "a.jsonl.xz",
        "c.parquet",
        "README.txt",
        "info.json",
        ".hidden.jsonl",
        "more.jsonl/x.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names_in(tmp_path) == ["a.jsonl.xz", "b.jsonl", "c.parquet"]


def test_a_folder_of_text_files(tmp_path):
    for name in ("2.txt", "1.TXT.gz", "picture.png"):
        (tmp_path / name).touch()
    assert names_in(tmp_path) == ["1.TXT.gz", "2.txt"]


def test_a_folder_without_data(tmp_path):
    (tmp_path / "data.csv").touch()
    with pytest.raises(UserError, match=r"--source: the folder .* holds no .jsonl file, nor .parquet or .txt"):
        names_in(tmp_path)


@pytest.mark.parametrize("source", ["missing.jsonl", "./owner/missing.jsonl", "/missing/data.jsonl"])
def test_no_such_file(source):
    with pytest.raises(UserError, match=f"--source: there is no file or folder {source}; name one, or owner/dataset"):
        resolve_files(source, "--source")


def test_the_hub_out_of_reach():
    with pytest.raises(UserError) as refusal:  # the tests run offline
        resolve_files("owner/dataset/file.parquet", "--source")
    assert str(refusal.value).startswith(
        "--source: there is no file owner/dataset/file.parquet, and as a hub id it gave: "
    )


def test_the_one_data_file_of_a_hub_data_set(monkeypatch):
    names = [".gitattributes", "README.md", "dataset_infos.json", "data/train.parquet"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repo_id, **kwargs: names)
    monkeypatch.setattr("component.data.source.hf_hub_download", lambda repo, name, **kwargs: f"/cache/{repo}/{name}")
    assert [str(file) for file in resolve_files("owner/dataset", "--source")] == [
        "/cache/owner/dataset/data/train.parquet"
    ]


def test_fingerprint_of_the_texts_that_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text("one")
    first = texts_fingerprint(str(tmp_path), "train_file")
    assert texts_fingerprint(str(tmp_path / "a.jsonl"), "train_file") == first, "the same texts"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("no data beside .jsonl files")
    assert texts_fingerprint(str(tmp_path), "train_file") == first
    (tmp_path / "a.jsonl").write_text("two")
    assert texts_fingerprint(str(tmp_path), "train_file") != first
    (tmp_path / "a.jsonl").write_text("one")
    (tmp_path / "b.jsonl").write_text("two")
    assert texts_fingerprint(str(tmp_path), "train_file") != first
    assert texts_fingerprint(None, "eval_file") is None
    assert texts_fingerprint("owner/texts/a.jsonl", "train_file") is None
