"""Results of several seeds are collected per run, for tables and figures."""

from script.experiment.results import gather, texts_of, values_of


def result(row: str, seed: int, perplexity: float | None, length: int = 4096) -> dict:
    entries = [{"seq_len": length, "perplexity": perplexity, "by_position": [seed]}]
    return {
        "row": row,
        "seed": seed,
        "length": length,
        "losses": [[20, 3.0 + seed]],
        "evaluation": {"full": {"books": {"longlora": entries, "sliding": []}}},
        "training": {"peak_reserved_gib": 1.5},
    }


def test_results_are_ordered_by_seed():
    rows = gather([result("longqlora", 1, 6.0), result("longqlora", 0, 5.0)], [], "longlora")
    row = rows["longqlora", 4096]
    assert (row["seeds"], row["reserved_gib"]) == ([0, 1], 1.5)
    assert values_of(row, "books", 4096) == [5.0, 6.0]
    assert row["by_position"] == {"full": {"books": [0]}}  # of the first seed
    assert row["losses"] == {0: [[20, 3.0]], 1: [[20, 4.0]]}
    assert texts_of(rows) == ["books"]


def test_missing_and_infinite_results_have_no_value():
    row = gather([result("longqlora", 0, None)], [], "longlora")["longqlora", 4096]
    assert values_of(row, "books", 4096) == []
    assert values_of(row, "books", 512) == values_of(row, "code", 4096) == values_of(None, "books", 4096) == []
    assert values_of(gather([result("full", 0, 5.0)], [], "sliding")["full", 4096], "books", 4096) == []


def test_the_base_is_shown_at_every_length():
    rows = gather([result("base", 0, 9.0), result("longqlora", 0, 5.0, 8192)], [], "longlora")
    assert rows["base", 8192] is rows["base", 4096]


def test_step_seconds_are_the_median_after_five_warm_up_steps():
    cost = {"row": "full", "length": 4096, "training": {"step_seconds": [9.0] * 5 + [1.0, 2.0, 7.0]}}
    rows = gather([result("full", 0, 5.0)], [cost, cost | {"row": "longqlora"}], "longlora")
    assert rows["full", 4096]["step_seconds"] == 2.0
    assert rows.keys() == {("full", 4096)}
