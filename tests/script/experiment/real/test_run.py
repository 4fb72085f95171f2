"""Rows are trained and measured on texts of one's own; what is done is not done again."""

import argparse
import hashlib
import json

import pytest

from component.error import UserError
from component.storage.result import write_json
from script.experiment.real.run import FLAGS_FILE, check_same_work, requested_rows
from tests.outcome import refused_by_us
from tests.words import write_lines

RUN = "script/experiment/real/run.py"


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    for kind, count in (("train", 40), ("validation", 30)):
        lines = [{"text": f"Number {at}. " + "The hills are far, and the river is wide. " * 20} for at in range(count)]
        write_lines(folder / f"books-{kind}.jsonl", *lines)
    write_lines(tmp_path / "other.jsonl", *({"content": f"{at} feathers fell. " * 20} for at in range(9)))
    return folder


@pytest.fixture
def run(run_program, base_folder, texts, tmp_path):
    def start(*words):
        paths = ["--base", base_folder, "--texts", texts, "--work", tmp_path / "work"]
        small = ["--length", 96, "--max_steps", 1, "--windows", 48, "--seeds", 1, "--samples", 0]
        return run_program(RUN, *paths, *small, "--other", tmp_path / "other.jsonl", "--other_key", "content", *words)

    return start


@pytest.mark.slow
def test_rows(run, texts, tmp_path):
    rows = ["untrained-linear", "paper-last", "mixture", "full", "full-attention"]
    outcome = run("--rows", *rows, "--jobs", 2, "--keep", "paper-last")
    assert outcome.status == 0, outcome.err
    for name in rows:
        found = json.loads((tmp_path / f"work/results/{name}-0.json").read_text())
        assert (found["row"], found["length"], found["seed"]) == (name, 96, 0)
        assert {text: [r["seq_len"] for r in found["perplexity"][text]] for text in ("books", "other")} == {
            "books": [48, 96],
            "other": [48],
        }
        assert all(entry["perplexity"] > 1 for entry in found["perplexity"]["books"])
        assert all(entry["key_tokens"] is not None for entry in found["perplexity"]["books"])
        if name != "untrained-linear":
            assert found["settings"]["max_seq_length"] == 96
            assert found["training"]["train_loss"] > 1
            assert found["rows_per_gpu"] == 2
        if name in ("paper-last", "mixture", "full-attention"):
            assert found["eval_losses"][0][0] == 1
            assert found["eval_losses"][0][1] > 1
    assert [path.name for path in (tmp_path / "work/runs").iterdir() if path.is_dir()] == ["paper-last-0"]
    described = json.loads((tmp_path / "work/data/texts.json").read_text())
    counts = {entry["file"]: entry["count"] for entry in described["texts"]}
    assert counts == {"books-train.jsonl": 40, "books-validation.jsonl": 30, "other.jsonl": 9}
    digest = hashlib.sha256((texts / "books-train.jsonl").read_bytes()).hexdigest()
    assert described["texts"][0]["sha256"] == digest
    again = run("--rows", *rows)
    assert json.loads((tmp_path / "work/flags.json").read_text())["length"] == 96
    refused_by_us(run("--rows", *rows, "--length", 80), "--length: 80, but it was 96 for what is in ")
    assert again.out.splitlines()[0].startswith("0 rows, 0 of them trained")
    assert run("--rows", "pose", "--jobs", 2).status == 0
    alone = json.loads((tmp_path / "work/results/pose-0.json").read_text())
    assert alone["rows_per_gpu"] == 1, "nothing shared its GPU, so its step times count"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base", "no/such/folder"), "--base: there is no model folder 'no/such/folder'"),
        (("--base", "owner/no-such-model"), "--base: 'owner/no-such-model' can't be read"),
        (("--tokens_per_second", 0), "--tokens_per_second: 0; use a number above 0"),
        (("--tokens_per_second", 5, "--price", "nan"), "--price: nan; use a number above 0"),
    ],
)
def test_wrong_flags(words, message, run):
    refused_by_us(run("--rows", "ours", "--dry_run", *words), message)


def test_what_it_will_cost(run, tmp_path):
    """Two rows of 1 step of 4 x 96 tokens."""
    words = ["--rows", "ours", "yarn-s2", "base", "--dry_run"]
    outcome = run(*words)
    assert outcome.status == 0, outcome.err
    assert (
        "3 rows, 2 of them trained on 0.0 M tokens; --tokens_per_second estimates hours; 1 at a time on "
        in outcome.out
    )
    outcome = run(*words, "--max_steps", 1000, "--tokens_per_second", 100, "--price", 3)
    assert (
        "2 of them trained on 0.8 M tokens: about 2.1 hours of a GPU, 6.40 at 3 an hour, besides measuring"
        in outcome.out
    )
    assert not (tmp_path / "work").exists()


def test_a_work_folder_of_other_texts(texts, tmp_path):
    """Of the same names: what is there would be taken for theirs."""
    keys = {"other_key": "content", "max_steps": 1, "length": 96, "windows": [48], "samples": 0}
    keys |= {"base": tmp_path / "base", "texts": texts, "other": [], "ruler_lengths": None, "work": tmp_path}
    flags = argparse.Namespace(**keys)
    flags.base.mkdir()
    (flags.base / "config.json").write_text("{}")
    write_json(tmp_path / FLAGS_FILE, check_same_work(flags))
    check_same_work(flags)
    packed = texts / "books-train.txt"
    (texts / "books-train.jsonl").rename(packed)
    check_same_work(flags)
    packed.write_text("{}")
    with pytest.raises(UserError, match=r"^--work: train books changed since .* was begun"):
        check_same_work(flags)


def test_a_kind_of_text_called_other(run, texts):
    (texts / "books-train.jsonl").rename(texts / "other-train.jsonl")
    refused_by_us(run("--rows", "base"), "--texts: a kind of text is called other, as those of --other are")


def test_wrong_names(run, texts):
    refused_by_us(run("--rows", "our"), "--rows: 'our' is not in script/experiment/real/rows.py (did you mean ours?)")
    refused_by_us(
        run("--rows", "ours", "--keep", "theirs"), "--keep: 'theirs' is not in script/experiment/real/rows.py"
    )
    (texts / "books-validation.jsonl").unlink()
    refused_by_us(run("--rows", "base"), f"--texts: {texts} holds no file NAME-validation.*")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max_steps", 2), "--max_steps: 2, but it was 1 for what is in "),
        (("--windows", 48, 96), "--windows: [48, 96], but it was [48] for what is in "),
        (("--length", 64, "--samples", 1), "--length: 64, but it was 96; --samples: 1, but it was 0"),
        ((), ""),
        (("--jobs", 2, "--seeds", 2, "--time_limit_s", 5), ""),
    ],
)
def test_results_of_other_flags_are_not_taken_for_these(run, base_folder, tmp_path, words, message):
    """Also where nothing is left to do."""
    (tmp_path / "work/results").mkdir(parents=True)
    write_json(tmp_path / "work/results/base-0.json", {})
    base = {"base": base_folder.name, "texts": ["books"], "other": ["other.jsonl"], "other_key": "content"}
    write_json(tmp_path / "work/flags.json", base | {"samples": 0, "length": 96, "max_steps": 1, "windows": [48]})
    outcome = run("--rows", "base", *words)
    if message:
        refused_by_us(outcome, message, "use the same flags, or another --work")
    else:
        assert outcome.status == 0, outcome.err


def test_order():
    flags = argparse.Namespace(rows=["base", "ours", "full-attention"], keep=[], seeds=2)
    pairs = [(row.name, seed) for row, seed in requested_rows(flags)]
    assert pairs == [("full-attention", 0), ("base", 0), ("ours", 0), ("ours", 1), ("full-attention", 1)]


@pytest.mark.slow
def test_a_row_that_fails(run, tmp_path):
    """The row that finds key tokens can't be written: the others are measured without LongPPL."""
    assert run("--rows", "untrained-linear").status == 0
    (tmp_path / "work/runs/full-attention-0").write_text("a file")
    outcome = run("--rows", "full-attention", "paper")
    refused_by_us(outcome, "1 rows failed: full-attention-0")
    for name in ("untrained-linear", "paper"):
        found = json.loads((tmp_path / f"work/results/{name}-0.json").read_text())
        assert not any(entry["key_tokens"] for entry in found["perplexity"]["books"])
