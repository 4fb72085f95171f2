"""A pretraining corpus, whole files compared; and what a killed run, other flags and wrong inputs do to it.

Tokens are words here (tests/words.py): a text of n words has n + 2 tokens.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

from tests.conftest import ROOT
from tests.outcome import refused_by_us
from tests.words import read_lines, word_tokenizer, write_lines

PROGRAM = "script/data/build_pretrain.py"


def words(count: int, first: str = "a") -> str:
    return " ".join([first] + ["b"] * (count - 1))


words_of = words


@pytest.fixture
def build(run_program, word_folder, tmp_path):
    def run(*sources: Path, output: str = "out.jsonl", **flags):
        values = {"min_tokens": 5, "max_tokens": 10, "num_proc": 1, "max_bad_fraction": 0.5} | flags
        options = [word for name, value in values.items() if value is not False for word in (f"--{name}", value)]
        options = [word for word in options if word is not True]
        return run_program(
            PROGRAM, "--source", *sources, "--tokenizer", word_folder, "--output", tmp_path / output, *options
        )

    return run


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    first = [{"text": words(n, first="a")} for n in (2, 3, 5, 8, 9, 40)]  # 3 to 8 words fit
    second = [{"text": words(5, "a"), "id": 1}, {"text": "  "}, {"text": words(4, "«é»")}, {"txt": "a"}]
    file = tmp_path / "in" / "2.jsonl.gz"
    write_lines(tmp_path / "in" / "1.jsonl", *first)
    file.write_bytes(gzip.compress(write_lines(tmp_path / "plain", *second).read_bytes()))
    return [tmp_path / "in"]


def test_the_files(build, sources, tmp_path, word_folder):
    outcome = build(*sources)
    assert outcome.status == 0, outcome.err
    kept = [words(3), words(5), words(8), words(4, "«é»")]
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "".join(f'{{"text": "{text}"}}\n' for text in kept)
    stats = json.loads((tmp_path / "out.stats.json").read_text())
    folder = tmp_path / "in"
    first, second = (
        {"file": str(folder / n), "bytes": (folder / n).stat().st_size} for n in ("1.jsonl", "2.jsonl.gz")
    )
    none = {"bad": 0, "too_short": 0, "too_long": 0, "split": 0, "duplicates": 0}
    assert stats["sources"] == [
        first | none | {"read": 6, "too_short": 1, "too_long": 2, "kept": 3, "sampled": 3},
        second | none | {"read": 4, "bad": 1, "too_short": 1, "duplicates": 1, "kept": 1, "sampled": 1},
    ]
    total = {"read": 10, "bad": 1, "too_short": 2, "too_long": 2, "duplicates": 1, "kept": 4, "sampled": 4}
    assert stats["counts"] == none | total | {"bytes": first["bytes"] + second["bytes"]}
    assert stats["lengths"] | {"percentiles": 0} == {
        "texts": 4,
        "tokens": 28,
        "min": 5,
        "mean": 7.0,
        "median": 6.5,
        "max": 10,
        "percentiles": 0,
        "histogram": {"edges": [5, 6, 7, 8, 9, 10, 11], "texts": [1, 1, 1, 0, 0, 1]},
    }
    assert stats["tokenizer"]["name"] == str(word_folder)
    assert stats["tokenizer"]["vocab_size"] == 8
    assert len(stats["tokenizer"]["sha256"]) == 64
    assert stats["flags"]["seed"] == 42
    assert stats["command"].startswith("python script/data/build_pretrain.py --source ")
    assert '"edges": [ 5, 6, 7, 8, 9, 10, 11 ]' in (tmp_path / "out.stats.json").read_text(), "lists on one line"
    assert set(stats) == {"counts", "sources", "lengths", "tokenizer", "flags", "command", "versions", "date"}
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"
    assert sorted(file.name for file in tmp_path.glob("*out*")) == ["out.jsonl", "out.png", "out.stats.json"]
    assert f'1 of 10 lines skipped: {folder / "2.jsonl.gz"}:4: no "text" (its keys: txt)' in outcome.out
    assert f"out.jsonl: 4 texts, 28 tokens -> {tmp_path}/out.jsonl" in outcome.out


def test_training_reads_it(build, sources, tmp_path, own_cache):
    from component.data.dataset import load_samples

    build(*sources)
    samples, report = load_samples(str(tmp_path / "out.jsonl"), word_tokenizer(), 10, sft=False)
    assert [len(ids) for ids in samples["input_ids"]] == [5, 7, 10, 6], "as the builder counts"
    assert report.cut == 0


def many(tmp_path: Path, count: int = 1500) -> list[Path]:
    """Texts of 3 to 9 words, each different, in two files."""
    texts = [{"text": " ".join([f"w{at}", *"bcdbcdbc"[: 2 + at % 7]])} for at in range(count)]
    return [
        write_lines(tmp_path / "x.jsonl", *texts[: count // 3]),
        write_lines(tmp_path / "y.jsonl", *texts[count // 3 :]),
    ]


def test_a_sample_does_not_depend_on_processes_or_order(build, tmp_path):
    files = many(tmp_path)
    for output, order, flags in [
        ("1.jsonl", files, {}),
        ("2.jsonl", files, {"num_proc": 2}),
        ("3.jsonl", files[::-1], {"num_proc": 2}),
        ("4.jsonl", files, {"seed": 7}),
    ]:
        assert build(*order, output=output, num_samples=100, **flags).status == 0
    one, turned, other = (read_lines(tmp_path / f"{number}.jsonl") for number in (1, 3, 4))
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert len(one) == len(other) == 100
    assert sorted(map(str, one)) == sorted(map(str, turned)), "the same texts, in the order of the input"
    assert one != turned
    assert 0 < len({str(text) for text in one} & {str(text) for text in other}) < 30
    numbers = [int(record["text"].split()[0][1:]) for record in one]
    assert numbers == sorted(numbers)
    assert set(Counter(number // 500 for number in numbers)) == {0, 1, 2}


def test_small_chunks_change_nothing(build, tmp_path, monkeypatch):
    files = many(tmp_path, 200)
    build(*files, output="1.jsonl", num_samples=20)
    monkeypatch.setattr("component.corpus.scan.CHUNK_RECORDS", 3)
    build(*files, output="2.jsonl", num_samples=20, num_proc=2)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_long_texts_are_split(build, tmp_path):
    text = "a a a\nb b b\n\nc c c\nd d d\n\ne e e\na a a"
    file = write_lines(tmp_path / "in.jsonl", {"text": text}, {"text": "a b c"}, {"text": text + "\n\n"})
    assert build(file, long_texts="split").status == 0
    cut = ["a a a\nb b b", "c c c\nd d d", "e e e\na a a", "a b c"]
    assert [record["text"] for record in read_lines(tmp_path / "out.jsonl")] == cut, "equal pieces count once"
    counts = json.loads((tmp_path / "out.stats.json").read_text())["counts"]
    assert (counts["read"], counts["split"], counts["too_long"], counts["duplicates"], counts["sampled"]) == (
        3,
        2,
        0,
        3,
        4,
    )
    build(file, output="dropped.jsonl")
    assert [record["text"] for record in read_lines(tmp_path / "dropped.jsonl")] == ["a b c"]


def test_text_files_and_another_key(build, tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text("b b b b\n")
    (tmp_path / "books" / "a.txt").write_text("a a a a a")
    lines = write_lines(tmp_path / "in.jsonl", {"story": "c c c c"})
    assert build(tmp_path / "books", lines, text_key="story").status == 0
    assert [record["text"] for record in read_lines(tmp_path / "out.jsonl")] == ["a a a a a", "b b b b\n", "c c c c"]


# --- killed runs ---


def start_and_kill(arguments: list, journal: Path, lines: int) -> None:
    """kill -9 as soon as the journal has so many lines; the workers must follow."""
    process = subprocess.Popen([sys.executable, str(ROOT / PROGRAM), *map(str, arguments)], stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < until
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def test_a_killed_run_goes_on_and_writes_the_same_bytes(build, tmp_path, word_folder):
    texts = [{"text": " ".join([f"w{at}", *"bcd" * 400])} for at in range(6000)]
    file = write_lines(tmp_path / "in.jsonl", *texts)
    flags = {"min_tokens": 10, "max_tokens": 5000, "num_samples": 50, "num_proc": 2}
    build(file, output="whole.jsonl", **flags)
    options = [word for name, value in (flags | {"max_bad_fraction": 0.5}).items() for word in (f"--{name}", value)]
    journal = tmp_path / "out.jsonl.journal"
    arguments = ["--source", file, "--tokenizer", word_folder, "--output", tmp_path / "out.jsonl", *options]
    start_and_kill(arguments, journal, lines=4)
    done = journal.read_bytes()
    assert 4 <= done.count(b"\n") < 6000 // 256 + 2, "killed half-way"
    assert not (tmp_path / "out.jsonl").exists()
    journal.write_bytes(done + b'{"file":0,"last":')  # as if killed while it wrote a line
    outcome = build(file, **flags)
    assert "resuming an interrupted run after " in outcome.out
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    ours, whole = (json.loads((tmp_path / f"{name}.stats.json").read_text()) for name in ("out", "whole"))
    assert ours["counts"] == whole["counts"]
    assert ours["lengths"] == whole["lengths"]
    assert not journal.exists()


@pytest.fixture
def unfinished(build, tmp_path, monkeypatch):
    """A run that measured everything and was killed before it wrote."""
    files = many(tmp_path, 60)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("component.corpus.pretrain.write_corpus", killed)
        assert build(*files).status == 130
    assert (tmp_path / "out.jsonl.journal").exists()
    return files


def test_nothing_is_measured_twice(build, unfinished, tmp_path, monkeypatch):
    monkeypatch.setattr("component.corpus.pretrain.TextMeasure.__call__", None)
    assert build(*unfinished).status == 0
    assert len(read_lines(tmp_path / "out.jsonl")) == 52, "all but those of 9 words"


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"min_tokens": 6}, "min_tokens (5, now 6)"), ({"long_texts": "split"}, "long_texts (drop, now split)")],
)
def test_other_flags_do_not_go_on_with_a_killed_run(build, unfinished, tmp_path, flags, message):
    refused_by_us(build(*unfinished, **flags), "out.jsonl.journal", message, "its own flags and files", "--overwrite")
    assert build(*unfinished, **flags, overwrite=True).status == 0
    assert (tmp_path / "out.jsonl").exists()


def test_changed_files_do_not_go_on_with_a_killed_run(build, unfinished):
    with unfinished[0].open("a") as file:
        file.write('{"text": "a b c d"}\n')
    refused_by_us(build(*unfinished), "list of input files, or files that have changed since")


def test_a_file_that_changes_between_the_passes(build, unfinished, tmp_path):
    before = unfinished[1].stat()
    unfinished[1].write_bytes(unfinished[1].read_bytes().replace(b"w50", b"v50"))
    os.utime(unfinished[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    refused_by_us(build(*unfinished), f"{unfinished[1]}:31: changed while it was read; run the command again")
    assert not list(tmp_path.glob("*out.jsonl*"))
    assert build(*unfinished).status == 0, "measured anew"
    assert {"text": "v50 b c d"} in read_lines(tmp_path / "out.jsonl")


# --- what is refused ---


def test_an_existing_output_stays(build, sources, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    refused_by_us(build(*sources), "--output", "out.jsonl exists", "--overwrite")
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    assert build(*sources, overwrite=True).status == 0
    assert len(read_lines(tmp_path / "out.jsonl")) == 4


def test_a_source_is_not_overwritten(build, sources, tmp_path):
    file = sources[0] / "1.jsonl"
    before = file.read_bytes()
    refused_by_us(
        build(*sources, output="in/1.jsonl", overwrite=True),
        f"--output: {file} would be overwritten, but --source reads it",
    )
    assert file.read_bytes() == before


def test_wrong_flags_are_told_together(build, sources, tmp_path):
    outcome = build(*sources, min_tokens=9, max_tokens=8, num_samples=0, num_proc=0, max_bad_fraction=2, output="")
    refused_by_us(
        outcome, "--min_tokens 9, --max_tokens 8", "--num_samples: 0", "--num_proc: 0", "--max_bad_fraction: 2.0"
    )
    refused_by_us(outcome, f"--output: {tmp_path} is a folder; name a file")


def test_too_many_bad_lines(build, sources, tmp_path):
    outcome = build(*sources, max_bad_fraction=0.05)
    refused_by_us(outcome, "1 of 10 lines can't be used", f'{tmp_path}/in/2.jsonl.gz:4: no "text" (its keys: txt)')
    assert not (tmp_path / "out.jsonl").exists()


def test_k20_bad_lines_can_be_repaired(build, sources, tmp_path):
    """Also with another flag: a journal of the lines as they were would be in the way."""
    assert build(*sources, max_bad_fraction=0.05).status == 1
    assert not list(tmp_path.glob("*.journal"))
    file = tmp_path / "in" / "2.jsonl.gz"
    lines = gzip.decompress(file.read_bytes()).replace(b'"txt"', b'"text"')
    file.write_bytes(gzip.compress(lines))
    assert build(*sources, max_bad_fraction=0, max_tokens=11).status == 0


def test_no_text_that_fits(build, sources):
    refused_by_us(
        build(*sources, min_tokens=1000, max_tokens=2000), "no text of 1,000 to 2,000 tokens", "--min_tokens"
    )


def test_no_text_at_all(build, tmp_path):
    refused_by_us(build(write_lines(tmp_path / "empty.jsonl")), f"nothing to read in {tmp_path}/empty.jsonl")


def test_no_source_and_no_tokenizer(build, run_program, sources, tmp_path):
    refused_by_us(build(tmp_path / "none.jsonl"), "--source: there is no file or folder", "none.jsonl")
    outcome = run_program(
        PROGRAM, "--source", *sources, "--tokenizer", tmp_path / "none", "--output", tmp_path / "out.jsonl"
    )
    refused_by_us(outcome, "--tokenizer: there is no folder", "none")


def test_a_damaged_file(build, tmp_path):
    file = tmp_path / "in.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "a b c d"}\n' * 50)[:-9])
    for num_proc in (1, 2):
        refused_by_us(build(file, num_proc=num_proc), f"{file}: truncated, damaged or not readable")


def test_done_as_told_after_no_text_fits(build, sources, tmp_path):
    """K20: the journal of the first try refused the very change that its error asked for."""
    refused_by_us(build(*sources, min_tokens=1000, max_tokens=2000), "no text of 1,000 to 2,000 tokens")
    assert not (tmp_path / "out.jsonl.journal").exists()
    assert build(*sources).status == 0
    assert (tmp_path / "out.jsonl").is_file()


# ---- a mixture


@pytest.fixture
def mix(run_program, word_folder, tmp_path):
    def run(*words, output: str = "out.jsonl", **top):
        long = [{"text": words_of(n, f"long{n}")} for n in range(8, 30)]
        short = [{"content": words_of(n, f"short{n}")} for n in range(1, 60)]
        write_lines(tmp_path / "long.jsonl", *long)
        write_lines(tmp_path / "short.jsonl", *short)
        sources = [
            {"name": "long", "path": str(tmp_path / "long.jsonl"), "share": 3, "min_tokens": 10, "max_tokens": 40},
            {"name": "short", "path": str(tmp_path / "short.jsonl"), "share": 1, "min_tokens": 3, "max_tokens": 9,
             "text_key": "content"},
        ]  # fmt: skip
        config = tmp_path / "sources.yaml"
        config.write_text(yaml.safe_dump({"sources": sources, **top}))
        options = ["--tokenizer", word_folder, "--output", tmp_path / output, "--num_proc", 1]
        return run_program(PROGRAM, "--config", config, *options, *words)

    return run


def test_a_mixture(mix, tmp_path):
    """22 long texts of 10 to 31 tokens, 451 in all; 7 short ones of 3 to 9, 42 in all, so long ones give 126."""
    outcome = mix()
    assert outcome.status == 0, outcome.err
    texts = [line["text"] for line in read_lines(tmp_path / "out.jsonl")]
    lengths = {"long": [], "short": []}
    for text in texts:
        lengths["long" if text.startswith("long") else "short"].append(len(text.split()) + 2)
    assert sorted(lengths["short"]) == [3, 4, 5, 6, 7, 8, 9]
    assert 126 - 31 < sum(lengths["long"]) <= 126
    kinds = [text.startswith("long") for text in texts]
    assert kinds != sorted(kinds)
    assert kinds != sorted(kinds, reverse=True)
    stats = json.loads((tmp_path / "out.stats.json").read_text())
    assert stats["unit"] == "tokens"
    assert [source["read"] for source in stats["sources"]] == [22, 59]
    assert [source["too_long"] for source in stats["sources"]] == [0, 52]
    assert [source["sampled_tokens"] for source in stats["sources"]] == [sum(lengths["long"]), 42]
    assert "short: 7 of 7 texts, 42 tokens, " in outcome.out
    assert (tmp_path / "out.png").exists()
    first = (tmp_path / "out.jsonl").read_bytes()
    assert mix("--num_proc", 2, output="again.jsonl").status == 0
    assert (tmp_path / "again.jsonl").read_bytes() == first


def test_a_mixture_or_files(mix, build, sources, tmp_path):
    assert "--min_tokens: 5 beside --config; write it there, by source" in mix("--min_tokens", 5).err
    assert "--source, --config: both given" in mix("--source", sources[0]).err


def test_a_mixture_of_nothing(mix):
    outcome = mix(total=1)
    assert outcome.status == 1
    assert "sources.yaml fits; change lengths and shares there" in outcome.err


def test_a_mixture_without_one_of_its_sources(mix, run_program, word_folder, tmp_path):
    """All others would be written, as if the shares were kept; its journal does not stand in the way of a cure."""
    assert mix().status == 0
    config = tmp_path / "sources.yaml"
    sources = yaml.safe_load(config.read_text())["sources"]
    whole = sources[1] | {"name": "whole", "share": None}
    sources[1] |= {"min_tokens": 70, "max_tokens": 90}
    for changes, status in (([*sources, whole], 1), ([sources[0], whole], 0)):
        config.write_text(yaml.safe_dump({"sources": changes}))
        output = tmp_path / "two.jsonl"
        outcome = run_program(PROGRAM, "--config", config, "--tokenizer", word_folder, "--output", output)
        assert outcome.status == status, outcome.err
        assert ("--config: short: nothing in it fits" in outcome.err) == (status == 1)
        assert output.exists() == (status == 0)
