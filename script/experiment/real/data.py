"""On which texts are recipes compared on a real model? Training texts cut to the rows' lengths, and held-out ones.

WORK/data holds TEXTS.jsonl to train on, NAME.bin to measure on (NAME-LENGTH.bin for a row that is extended further
than the others, so that those are measured on the same texts with and without it), other.bin with texts unlike the
training's, eval.jsonl for the loss during training, and texts.json: ids and hashes of all files.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import yaml

from component.data.source import RecordTally, read_records
from component.error import UserError
from component.storage.result import write_json
from script.experiment.real.rows import LENGTH, Row
from script.shared.program import execute

HELD_OUT = 12  # pieces of each kind of text, each as long as a window and a bit more
FEWER = 4  # of those longer than LENGTH
DURING_TRAINING = 3  # of each kind
SHORT = 2048  # tokens: window for texts unlike the training's
NAMED = ("id", "title", "year", "licence")  # of a text, if it has them


def length_of(row: Row, flags: argparse.Namespace) -> int:
    return min(row.length, flags.length or row.length)


def common_length(flags: argparse.Namespace) -> int:
    """Tokens that most rows are extended to, and all are measured at."""
    return min(LENGTH, flags.length or LENGTH)


def measured_texts(row: Row, flags: argparse.Namespace) -> dict[str, list[int]]:
    """{name of a file of WORK/data: tokens per window}; of texts unlike the training's at SHORT tokens alone."""
    length, common = length_of(row, flags), common_length(flags)
    windows = sorted({*(flags.windows or (SHORT, 8192)), common})
    texts = dict.fromkeys(sources(flags.texts, "validation"), windows)
    texts |= {f"{name}-{length}": [common, length] for name in texts if length != common}
    return texts | ({"other": [min(SHORT, *windows)]} if flags.other else {})


def prepare_data(flags: argparse.Namespace, rows: list[Row]) -> None:
    """Write what `rows` need and WORK/data lacks."""
    data = flags.work / "data"
    data.mkdir(parents=True, exist_ok=True)
    train, held_out = (sources(flags.texts, kind) for kind in ("train", "validation"))
    for row in rows:
        length, output = length_of(row, flags), data / f"{row.texts}.jsonl"
        if row.program is None or output.exists():
            continue
        if row.texts == "mixture":
            write_mixture(list(train.values()), length, data / "mixture.yaml")
            words = ["--config", str(data / "mixture.yaml")]
        else:
            words = [*_lengths(length), "--source", *train.values()]
        _build(flags, "build_pretrain.py", output, words)
    common = common_length(flags)
    for length in sorted({common, *(length_of(row, flags) for row in rows)}):
        for name, path in held_out.items():
            suffix = "" if length == common else f"-{length}"
            pieces, output = data / f"held-out-{name}{suffix}.jsonl", data / f"{name}{suffix}.bin"
            if not output.exists():
                count = HELD_OUT if length == common else FEWER
                words = [*_lengths(length), "--num_samples", str(count), "--source", path]
                _build(flags, "build_pretrain.py", pieces, words)
                _build(flags, "tokenize_bin.py", output, ["--source", str(pieces)])
    if flags.other and not (data / "other.bin").exists():
        _build(flags, "tokenize_bin.py", data / "other.bin", ["--source", *flags.other, "--text_key", flags.other_key])
    lines = [line for name in held_out for line in _first_lines(data / f"held-out-{name}.jsonl")]
    (data / "eval.jsonl").write_text("".join(lines), encoding="utf-8")
    if not (data / "texts.json").exists():
        write_json(data / "texts.json", describe(flags.base, [*train.values(), *held_out.values(), *flags.other]))


def sources(folder: Path, kind: str) -> dict[str, str]:
    """{NAME: file} of the texts."""
    found = {file.name.partition(f"-{kind}.")[0]: str(file) for file in sorted(folder.glob(f"*-{kind}.*"))}
    if not found:
        raise UserError(f"--texts: {folder} holds no file NAME-{kind}.*")
    return found


def write_mixture(files: list[str], length: int, config: Path) -> None:
    """A third of the tokens in pieces of at most 1/16 of `length` tokens, the others as in the other rows."""
    long = {"min_tokens": length + 1, "max_tokens": int(1.15 * length) + 64, "long_texts": "split"}
    short = {"min_tokens": 64, "max_tokens": max(128, length // 16), "long_texts": "split"}
    entries = [
        {"name": f"{kind} {at}", "path": path, "share": share, **lengths}
        for kind, share, lengths in (("long", 2, long), ("short", 1, short))
        for at, path in enumerate(files)
    ]
    config.write_text(yaml.safe_dump({"sources": entries}, sort_keys=False), encoding="utf-8")


def describe(base: Path, files: list[str]) -> dict[str, Any]:
    """Hashes of the base's weights and of the files of texts, and the ids of their texts."""
    weights = {file.name: _sha256(file) for file in sorted(base.glob("*.safetensors"))}
    texts = []
    for file in map(Path, files):
        records = (record for _, record in RecordTally().good(file, read_records(file, ())))
        named = [{key: record[key] for key in NAMED if key in record} for record in records]
        texts.append(
            {"file": file.name, "sha256": _sha256(file), "count": len(named), "texts": list(filter(None, named))}
        )
    return {"base": {"name": base.name, "sha256": weights}, "texts": texts}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _lengths(length: int) -> list[str]:
    bounds = {"min_tokens": length + 1, "max_tokens": int(1.15 * length) + 64, "long_texts": "split"}
    return [word for key, value in bounds.items() for word in (f"--{key}", str(value))]


def _first_lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines(keepends=True)[:DURING_TRAINING]


def _build(flags: argparse.Namespace, program: str, output: Path, words: list[str]) -> None:
    common = ["--tokenizer", str(flags.base), "--output", str(output), "--overwrite"]
    execute([f"script/data/{program}", *common, *words], flags.work / f"{output.name}.log")
