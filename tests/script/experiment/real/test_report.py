"""Tables of the experiments on a real model; the numbers are chosen so that means are known."""

import json

import pytest

from script.experiment.real.report import difference, perplexity_table, ruler_tables, scores
from tests.outcome import refused_by_us

REPORT = "script/experiment/real/report.py"


def result(row: str, seed: int, perplexity: float, right: list[int] | None = None) -> dict:
    found = {
        "row": row,
        "label": f"the {row}",
        "seed": seed,
        "length": 32768,
        "perplexity": {
            "books": [{"seq_len": n, "perplexity": perplexity + n / 1000} for n in (1000, 2000)],
            "other": [{"seq_len": 1000, "perplexity": None}],
        },
        "training": {"step_seconds": [9.0, 1.0, 3.0, 2.0], "peak_reserved_gib": 7.5},
    }
    if right is not None:
        trials = [
            {"task": task, "length": 2000, "sample": at, "score": float(score)}
            for task in ("vt", "cwe")
            for at, score in enumerate(right)
        ]
        found["ruler"] = {"trials": trials}
    return found


@pytest.fixture
def results() -> dict:
    return {
        "ours": [result("ours", 0, 10.0, [1, 1, 0, 1]), result("ours", 1, 12.0)],
        "full-attention": [result("full-attention", 0, 11.0, [1, 0, 0, 0])],
    }


def test_perplexities(results):
    assert perplexity_table(results).splitlines() == [
        "| perplexity | books 1000 | books 2000 | other 1000 | s/step | GiB |",
        "|---|---|---|---|---|---|",
        "| the ours | 12.00 ± 1.00 | 13.00 ± 1.00 | > 1000 | 2.00 | 7.50 |",
        "| the full-attention | 12.00 | 13.00 | > 1000 | 2.00 | 7.50 |",
    ]


def test_perplexities_of_key_tokens(results):
    for at, seeds in enumerate(results.values()):
        seeds[0]["perplexity"]["books"].append({"seq_len": 32768, "perplexity": 9.0, "long_ppl": 4.0 + at})
    lines = [line.split(" | ") for line in perplexity_table(results).splitlines()]
    assert [line[5] for line in (lines[0], *lines[2:])] == ["books LongPPL", "4.00", "5.00"]


def test_scores_beside_full_attention(results):
    (table,) = ruler_tables(results)
    lines = table.splitlines()
    assert lines[0] == "| RULER at 2000 | cwe | vt | mean | against full attention |"
    assert lines[2].startswith("| the ours | 75 | 75 | 75.0 | +50.0 (+")
    assert lines[3] == "| the full-attention | 25 | 25 | 25.0 | - |"
    mine, theirs = (scores(results[name][0]) for name in ("ours", "full-attention"))
    mean, low, high = difference(mine, theirs, 2000)
    assert mean == 50.0
    assert 0 < low < 50 < high < 100
    assert difference(mine, theirs, 4000) is None
    assert difference(mine, mine, 2000) == (0.0, 0.0, 0.0)


def test_files(run_program, results, tmp_path):
    folder = tmp_path / "work/results"
    folder.mkdir(parents=True)
    refused_by_us(run_program(REPORT, "--work", tmp_path / "work", "--output", tmp_path / "out"), "holds no results")
    for seeds in results.values():
        for one in seeds:
            (folder / f"{one['row']}-{one['seed']}.json").write_text(json.dumps(one))
    outcome = run_program(REPORT, "--work", tmp_path / "work", "--output", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "real_model.json",
        "real_model.md",
        "real_model.png",
    ]
    assert len(json.loads((tmp_path / "out/real_model.json").read_text())["rows"]) == 3
