"""Tables of the experiments on a real model; the numbers are chosen so that means are known."""

import json

import pytest

from script.experiment.real.report import (
    able_table,
    able_tasks,
    difference,
    perplexity_table,
    ruler_tables,
    scores,
    tokens_until_near,
)
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
        "training": {"step_seconds": [9.0, 1.0, 3.0, 2.0], "peak_reserved_gib": 7.5, "num_input_tokens_seen": 12e6},
        "rows_per_gpu": 1 + seed,
        "settings": {"max_steps": 4},
        "eval_losses": [[1, 2.0], [2, 1.5], [3, 1.508], [4, 1.5]],
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
        "| perplexity | books 1000 | books 2000 | other 1000 | s/step | GiB | M tokens | to 1 % |",
        "|---|---|---|---|---|---|---|---|",
        "| the ours | 12.00 ± 1.00 | 13.00 ± 1.00 | > 1000 | 2.00 | 7.5 | 12.0 | 6.0 |",
        "| the full-attention | 12.00 | 13.00 | > 1000 | 2.00 | 7.5 | 12.0 | 6.0 |",
    ]


def test_time_beside_other_rows_is_not_shown(results):
    results["ours"] = results["ours"][1:]
    assert "| the ours | 13.00 | 14.00 | > 1000 | - | 7.5 |" in perplexity_table(results)


def test_tokens_until_near_the_end(results):
    one = results["ours"][0]
    assert tokens_until_near(one) == 6e6
    assert tokens_until_near(one, share=1.0) == 3e6
    assert tokens_until_near(one, share=0.005) == 12e6  # it had been there before
    assert tokens_until_near(one | {"eval_losses": []}) is None
    assert tokens_until_near(one | {"settings": {"max_steps": 6}}) == 4e6  # the last steps are not evaluated


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


def test_no_mean_of_unfinished_tasks(results):
    """It would be the mean of other tasks than in the other rows; what both rows did is compared."""
    ruler = results["ours"][0]["ruler"]
    ruler["trials"] = [trial for trial in ruler["trials"] if trial["task"] != "cwe"]
    (table,) = ruler_tables(results)
    assert table.splitlines()[2].startswith("| the ours | - | 75 | - | +50.0 (")


def test_tasks_that_the_base_can_do():
    """The base scores 100 % and 25 % at the shortest length; only the first task counts."""

    def trials(*scored) -> dict:
        each = [
            {"task": t, "length": n, "sample": at, "score": s} for t, n, many in scored for at, s in enumerate(many)
        ]
        return {"trials": each}

    base = result("base", 0, 9.0) | {"ruler": trials(("vt", 40, [1, 1]), ("vt", 80, [1, 0]), ("cwe", 40, [0.5, 0]))}
    ours = result("ours", 0, 9.0) | {"ruler": trials(("vt", 40, [1, 0]), ("vt", 80, [0, 0]), ("cwe", 80, [1, 1]))}
    found = {"base": [base], "ours": [ours]}
    assert able_tasks(found) == ["vt"]
    assert able_table(found).splitlines() == [
        "| RULER: vt | 40 | 80 | 80 / 40 | against full attention |",
        "|---|---|---|---|---|",
        "| the base | 100.0 | 50.0 | 0.50 | - |",
        "| the ours | 50.0 | 0.0 | 0.00 | - |",
    ]
    assert able_table({"ours": [ours]}) == ""
    full = base | {"row": "full-attention", "label": "full"}
    table = able_table({**found, "full-attention": [full]}).splitlines()
    assert table[3].startswith("| the ours | 50.0 | 0.0 | 0.00 | -50.0 (")


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
        "perplexity.png",
        "real_model.json",
        "real_model.md",
    ]
    assert len(json.loads((tmp_path / "out/real_model.json").read_text())["rows"]) == 3
