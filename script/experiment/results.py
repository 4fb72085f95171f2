"""What did each run measure? Results of all seeds, collected for tables and figures."""

import statistics
from typing import Any

from script.experiment.rows import all_runs

SHOWN = {  # in the figure by length: run -> (label, color, marker)
    "base": ("base", "#8a8a8a", "x"),
    "untrained-linear": ("interpolated, untrained", "#cc79a7", "v"),
    "longqlora": ("LongQLoRA", "#0072b2", "o"),
    "full-last": ("LongQLoRA, full attention at the end", "#56b4e9", "P"),
    "yarn-last": ("our YAMLs: yarn, full attention at the end", "#009e73", "s"),
    "longlora": ("LongLoRA's setting", "#e69f00", "^"),
    "full": ("full fine-tuning", "#d55e00", "D"),
    "full-yarn": ("full fine-tuning, yarn", "#222222", "d"),
}
BY_POSITION = {  # (run, kind of evaluation) -> (label, color, line style)
    ("longqlora", "full"): ("causal S2, evaluated with full attention", "#0072b2", "-"),
    ("longqlora", "shift_short"): ("causal S2, evaluated under S2", "#0072b2", ":"),
    ("rolled", "full"): ("rolled S2, evaluated with full attention", "#d55e00", "-"),
    ("rolled", "rolled"): ("rolled S2, evaluated under rolled S2", "#d55e00", ":"),
    ("full-attention", "full"): ("full attention", "#8a8a8a", "-"),
}
LEVELS = {  # horizontal lines in the sweeps: run -> (label, color)
    "full-attention": ("LongQLoRA, full attention", "#8a8a8a"),
    "full": ("full fine-tuning", "#d55e00"),
    "full-yarn": ("full fine-tuning, yarn", "#222222"),
}
Rows = dict[tuple[str, int], dict[str, Any]]


def gather(results: list[dict], costs: list[dict], protocol: str) -> Rows:
    """{(run, extended length): label, settings, cost, "perplexity": {kind: {text: {window: [one per seed]}}}, ...}."""
    rows: Rows = {}
    known = all_runs()
    for result in sorted(results, key=lambda result: result["seed"]):
        new: dict[str, Any] = {
            "says": known[result["row"]].label,
            "settings": result.get("settings"),
            "seeds": [],
            "perplexity": {},
        }
        row = rows.setdefault((result["row"], result["length"]), new | {"by_position": {}, "losses": {}})
        row["seeds"].append(result["seed"])
        row["losses"][result["seed"]] = result.get("losses")
        if "training" in result:  # per process, so not affected by parallel runs
            row["reserved_gib"] = result["training"].get("peak_reserved_gib")
        for kind, texts in result["evaluation"].items():
            for text, measured in texts.items():
                by_window = row["perplexity"].setdefault(kind, {}).setdefault(text, {})
                for entry in measured.get(protocol, []):
                    by_window.setdefault(entry["seq_len"], []).append(entry["perplexity"])
                    if entry["seq_len"] == result["length"] and result["seed"] == 0:
                        row["by_position"].setdefault(kind, {})[text] = entry["by_position"]
    for length in {length for _, length in rows}:  # the base is not extended: the same result at every length
        if ("base", 4096) in rows:
            rows.setdefault(("base", length), rows["base", 4096])
    for cost in costs:
        row = rows.get((cost["row"], cost["length"]), {})
        row["step_seconds"] = statistics.median(cost["training"]["step_seconds"][5:])
    return rows


def values_of(row: dict | None, text: str, window: int, kind: str = "full") -> list[float]:
    """One per seed; empty if nothing was measured or no value is finite."""
    found = (row or {}).get("perplexity", {}).get(kind, {}).get(text, {}).get(window, [])
    return [value for value in found if value is not None]


def texts_of(rows: Rows) -> list[str]:
    return sorted({text for row in rows.values() for text in row["perplexity"].get("full", {})})
