"""One row of the experiments on a real model; whole rows: test_run.py."""

import argparse
import json
from functools import partial

import pytest
import torch
import yaml

from component.error import UserError
from script.experiment.real.rows import all_rows
from script.experiment.real.work import Trained, Worker, tokens_of
from tests.words import write_lines


@pytest.fixture
def worker(tmp_path, base_folder):
    (tmp_path / "work/data").mkdir(parents=True)
    (tmp_path / "work/runs").mkdir()
    (tmp_path / "work/results").mkdir()
    write_lines(tmp_path / "books-validation.jsonl", {"text": "a"})
    small = {
        "length": 32768,
        "max_steps": 1,
        "windows": None,
        "samples": 0,
        "keep": [],
        "other": [],
        "tokens_at_once": 9,
    }
    flags = argparse.Namespace(base=base_folder, work=tmp_path / "work", texts=tmp_path, **small)
    return Worker(flags)


def test_key_tokens_are_looked_for_by_one_row(worker):
    rows, file = all_rows(), worker.flags.work / "data/keys-books.json"
    found = worker.key_token_flags(rows["full-attention"], 0, "books")
    assert found[:4] == ["--long_ppl", "true", "--key_tokens", str(file)]
    assert found[4:] == ["--long_ppl_context", "4096", "--long_ppl_stride", "1024"]
    assert (
        worker.key_token_flags(rows["ours"], 0, "books")
        == worker.key_token_flags(rows["full-attention"], 1, "books")
        == []
    )
    file.write_text("{}")
    assert worker.key_token_flags(rows["ours"], 0, "books") == found


def test_a_row_that_fails(worker):
    """Its training file is not there; its settings can be read."""
    with pytest.raises(UserError, match=r"train\.jsonl"):
        worker.prepare(all_rows()["full-attention"], 0)
    settings = yaml.safe_load((worker.flags.work / "runs/full-attention-0.yaml").read_text())
    assert (settings["max_seq_length"], settings["seed"], settings["max_steps"]) == (32768, 0, 1)
    assert settings.get("bf16", False) == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("ours", 120 * 4 * 32768), ("ours-131072", 120 * 131072), ("pose", 120 * 4 * 8192), ("ours-300", 300 * 131072)],
)
def test_tokens_that_a_row_is_trained_on(name, tokens):
    assert tokens_of(all_rows()[name], argparse.Namespace(length=None, max_steps=None)) == tokens


def test_what_an_adapter_is_trained_anew_for_is_forgotten(worker, capsys):
    """Its answers; and key tokens, if it finds those of all rows, which then have others."""
    rows, data, folder = all_rows(), worker.flags.work / "data", worker.flags.work / "runs/ours-0"
    (data / "keys-books.json").write_text("{}")
    worker.ruler_file(folder).write_text("{}")
    worker.forget(rows["ours"], 0, folder)
    assert not worker.ruler_file(folder).exists()
    assert (data / "keys-books.json").exists()
    worker.forget(rows["full-attention"], 0, folder)
    assert not (data / "keys-books.json").exists()
    assert not capsys.readouterr().out
    (data / "keys-books.json").write_text("{}")
    (worker.flags.work / "results/ours-0.json").write_text("{}")
    worker.forget(rows["full-attention"], 0, folder)
    assert "LongPPL of rows with results is over the former ones" in capsys.readouterr().out


def test_nobody_waits_for_key_tokens_that_cannot_be_found(worker):
    """Measuring fails: there is no folder for its tasks."""
    (worker.flags.work / "runs").rmdir()
    told = []
    for name in ("full-attention", "ours"):
        row = all_rows()[name]
        with pytest.raises(FileNotFoundError):
            worker.finish(Trained(row, 0, ["--base_model", "no/such/folder"], {}, 0.0), partial(told.append, name))
    assert told == ["full-attention"]


def test_scaled_positions(worker, tmp_path):
    folder = worker.save_scaled(all_rows()["untrained-linear"], tmp_path / "scaled")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "linear"
    assert (
        config["rope_parameters"]["factor"]
        == 32768 / json.loads((worker.flags.base / "config.json").read_text())["max_position_embeddings"]
    )
