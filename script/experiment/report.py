"""Tables and figures of the experiments, from the results that script/experiment/run.py left.

    python script/experiment/report.py --work output/experiment --output figure

Writes experiment.json (the numbers of every row: mean and spread over seeds, cost, where they are from), experiment.md
(tables) and one experiment_*.png per question.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from component.error import UserError, exit_on_user_error
from component.storage.result import save_figure, write_json
from script.experiment.rows import ablation_rows, all_rows, main_rows

BASE_CONTEXT = 1024  # tokens, of script/experiment/pretrain.py's model
SHOWN = {  # of the figure by length: row -> (label, colour, marker)
    "base": ("base", "#8a8a8a", "x"),
    "untrained-linear": ("interpolated, untrained", "#cc79a7", "v"),
    "longqlora": ("LongQLoRA", "#0072b2", "o"),
    "full-last": ("LongQLoRA, full attention at last", "#56b4e9", "P"),
    "yarn-last": ("our YAMLs: yarn, full attention at last", "#009e73", "s"),
    "longlora": ("LongLoRA's setting", "#e69f00", "^"),
    "full": ("full fine-tuning", "#d55e00", "D"),
    "full-yarn": ("full fine-tuning, yarn", "#222222", "d"),
}
BY_POSITION = {  # (row, kind of evaluation) -> (label, colour, line)
    ("longqlora", "full"): ("causal S2, evaluated with full attention", "#0072b2", "-"),
    ("longqlora", "shift_short"): ("causal S2, evaluated under S2", "#0072b2", ":"),
    ("rolled", "full"): ("rolled S2, evaluated with full attention", "#d55e00", "-"),
    ("rolled", "rolled"): ("rolled S2, evaluated under rolled S2", "#d55e00", ":"),
    ("full-attention", "full"): ("full attention", "#8a8a8a", "-"),
}
LEVELS = {  # of the sweeps: row -> (label, colour)
    "full-attention": ("LongQLoRA, full attention", "#8a8a8a"),
    "full": ("full fine-tuning", "#d55e00"),
    "full-yarn": ("full fine-tuning, yarn", "#222222"),
}
KINDS = {
    "full": "adapter on the 16-bit base",
    "nf4": "adapter on the NF4 base it was trained on",
    "merged-fp16": "merged on the 16-bit base",
    "merged-nf4": "merged on the dequantised base",
    "shift_short": "under S2",
    "rolled": "under rolled S2",
}
Rows = dict[tuple[str, int], dict[str, Any]]


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of run.py, with its results and cost")
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON, the tables and the figures")
    return parser.parse_args()


def gather(results: list[dict], costs: list[dict], protocol: str) -> Rows:
    """By row and length extended to: what it is, its cost, {kind: {text: {window: perplexities of the seeds}}}, ..."""
    rows: Rows = {}
    known = all_rows()
    for result in sorted(results, key=lambda result: result["seed"]):
        new: dict[str, Any] = {
            "says": known[result["row"]].says,
            "settings": result.get("settings"),
            "seeds": [],
            "perplexity": {},
        }
        row = rows.setdefault((result["row"], result["length"]), new | {"by_position": {}, "losses": {}})
        row["seeds"].append(result["seed"])
        row["losses"][result["seed"]] = result.get("losses")
        if "training" in result:  # of its own process, so the same with others beside it
            row["reserved_gib"] = result["training"].get("peak_reserved_gib")
        for kind, texts in result["evaluation"].items():
            for text, measured in texts.items():
                by_window = row["perplexity"].setdefault(kind, {}).setdefault(text, {})
                for entry in measured.get(protocol, []):
                    by_window.setdefault(entry["seq_len"], []).append(entry["perplexity"])
                    if entry["seq_len"] == result["length"] and result["seed"] == 0:
                        row["by_position"].setdefault(kind, {})[text] = entry["by_position"]
    for length in {length for _, length in rows}:  # positions as they are: extended to nothing
        if ("base", 4096) in rows:
            rows.setdefault(("base", length), rows["base", 4096])
    for cost in costs:
        row = rows.get((cost["row"], cost["length"]), {})
        row["step_seconds"] = statistics.median(cost["training"]["step_seconds"][5:])
    return rows


def values_of(row: dict | None, text: str, window: int, kind: str = "full") -> list[float]:
    """Of the seeds; [] where nothing was measured, or nothing finite."""
    found = (row or {}).get("perplexity", {}).get(kind, {}).get(text, {}).get(window, [])
    return [value for value in found if value is not None]


def cell(values: list[float]) -> str:
    """Mean, and half of the range where there are several seeds."""
    if not values:
        return "-"
    mean = statistics.mean(values)
    if mean > 1000:
        return "> 1000"
    spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    return f"{mean:.2f}{spread}"


def texts_of(rows: Rows) -> list[str]:
    return sorted({text for row in rows.values() for text in row["perplexity"].get("full", {})})


def compact(rows: Rows, names: Iterable[str], length: int) -> str:
    """A line per row: perplexity of each text at the base's context and at the extended one, and what a step costs."""
    columns = [(text, window) for text in texts_of(rows) for window in sorted({BASE_CONTEXT, length})]
    head = [f"extended to {length}", *(f"{text} {window}" for text, window in columns), "s/step", "GiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in (rows[name, length] for name in names if (name, length) in rows):
        cells = [cell(values_of(row, text, window)) for text, window in columns]
        cost = [f"{row[key]:.2f}" if row.get(key) else "-" for key in ("step_seconds", "reserved_gib")]
        lines.append("| " + " | ".join([row["says"], *cells, *cost]) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def by_window(rows: Rows, names: Iterable[str], length: int, text: str, how: str = "") -> str:
    """A line per row, a column per window."""
    found = [rows[name, length] for name in names if (name, length) in rows]
    windows = sorted({window for row in found for window in row["perplexity"]["full"].get(text, {})})
    head = [f"{text}, extended to {length}{how}", *map(str, windows)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        f"| {row['says']} | " + " | ".join(cell(values_of(row, text, w)) for w in windows) + " |" for row in found
    ]
    return "\n".join(lines) if windows else ""


def by_kind(rows: Rows, name: str, length: int) -> str:
    """One row's model, evaluated in several ways."""
    row = rows.get((name, length))
    if row is None or len(row["perplexity"]) < 2:
        return ""
    columns = [(text, window) for text in texts_of(rows) for window in sorted({BASE_CONTEXT, length})]
    head = [row["says"], *(f"{text} {window}" for text, window in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind in row["perplexity"]:
        lines.append(f"| {KINDS[kind]} | " + " | ".join(cell(values_of(row, t, w, kind)) for t, w in columns) + " |")
    return "\n".join(lines)


def panels(rows: Rows, title: str = "{}", lines: int = 1):
    """A figure with `lines` panels above each other per text, and (the text's panels, text)."""
    texts = texts_of(rows)
    size = (5.4 * len(texts), 0.8 + 3.6 * lines)
    figure, axes = plt.subplots(lines, len(texts), figsize=size, layout="constrained", squeeze=False)
    for column, text in zip(axes.T, texts, strict=True):
        column[0].set(title=title.format(text))
        for one in column:
            one.set(ylabel="perplexity")
            one.grid(axis="y", color="0.9")
            one.spines[["top", "right"]].set_visible(False)
    return figure, [(list(column), text) for column, text in zip(axes.T, texts, strict=True)]


def finish(figure, axes, file: Path) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    save_figure(figure, file)
    plt.close(figure)


def ticks(axes, places: Iterable[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted(places), [f"{place:g}" for place in sorted(places)])
    axes.xaxis.minorticks_off()


def draw_lengths(rows: Rows, length: int, file: Path) -> None:
    """Perplexity against the window: all rows above, those near the base's own perplexity below."""
    figure, parts = panels(rows, f"{{}}, extended to {length}", lines=2)
    for (above, below), text in parts:
        windows: set[int] = set()
        near = []
        for name, (label, colour, marker) in SHOWN.items():
            row = rows.get((name, length))
            measured = sorted((row or {}).get("perplexity", {}).get("full", {}).get(text, {}))
            points = {w: statistics.mean(values) for w in measured if (values := values_of(row, text, w))}
            for axes in (above, below) if points else ():
                axes.plot(list(points), list(points.values()), color=colour, marker=marker, label=label, linewidth=1.6)
            windows |= set(points)
            if name not in ("base", "untrained-linear"):
                near += [value for window, value in points.items() if window <= length]
        own = values_of(rows.get(("base", length)), text, BASE_CONTEXT)
        low, high = min(near + own, default=0), max(near + own, default=1)
        above.set(yscale="log")
        for kind in (above.yaxis.set_major_formatter, above.yaxis.set_minor_formatter):
            kind(lambda value, _: f"{value:g}")
        below.set(xlabel="tokens of the window", ylim=(low - 0.1 * (high - low), high + 0.1 * (high - low)))
        for axes in (above, below):
            ticks(axes, windows)
    finish(figure, parts[0][0][0], file)


def draw_positions(rows: Rows, length: int, file: Path) -> None:
    """Perplexity by position in the window, for rolled and causal S2."""
    figure, parts = panels(rows, f"{{}}, windows of {length} tokens")
    for (axes,), text in parts:
        for (name, kind), (label, colour, line) in BY_POSITION.items():
            buckets = rows.get((name, length), {}).get("by_position", {}).get(kind, {}).get(text, [])
            middles = [(bucket["start"] + bucket["end"]) / 2 for bucket in buckets]
            if buckets:
                axes.plot(middles, [b["perplexity"] for b in buckets], line, color=colour, label=label, linewidth=1.6)
        group = (rows.get(("longqlora", length), {}).get("settings") or {}).get("group_size_ratio", 0.25) * length
        axes.axvspan(0, group / 2, color="0.93", zorder=0)
        axes.set(xlabel="position in the window (grey: the first half-group)")
    finish(figure, parts[0][0][0], file)


def draw_sweep(rows: Rows, sweep: "Sweep", length: int, file: Path) -> None:
    """Perplexity at the extended length against the number in rows' names, a line per kind of row.

    Of the first seed everywhere, the one that all rows have: the same initial weights and order of texts.
    """
    label, own, series = sweep
    figure, parts = panels(rows, f"{{}}, windows of {length} tokens")
    numbers = set()
    for (axes,), text in parts:
        for prefix, (main, says, colour) in series.items():
            found: dict[float, dict] = {own: rows[main, length]} if (main, length) in rows else {}
            for (name, n), row in rows.items():
                number = name.removeprefix(prefix)
                if n == length and name.startswith(prefix) and number.replace(".", "", 1).isdigit():
                    found[float(number)] = row
            points = {x: values[0] for x, row in sorted(found.items()) if (values := values_of(row, text, length))}
            if len(points) > 1:
                axes.plot(list(points), list(points.values()), color=colour, marker="o", linewidth=1.6, label=says)
                numbers |= set(points)
        for name, (says, colour) in LEVELS.items():
            level = values_of(rows.get((name, length)), text, length)[:1]
            if level:
                axes.axhline(level[0], color=colour, linestyle="--", linewidth=1.2, label=says)
        axes.set(xlabel=label)
        ticks(axes, numbers)
    if numbers:
        finish(figure, parts[0][0][0], file)
    plt.close(figure)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    read = {kind: [json.loads(f.read_text()) for f in sorted((flags.work / kind).glob("*.json"))] for kind in KEPT}
    if not read["results"]:
        raise UserError(f"--work: {flags.work}/results holds no result; run script/experiment/run.py first")
    rows, sliding = gather(read["results"], read["cost"], "longlora"), gather(read["results"], [], "sliding")
    lengths = sorted({length for _, length in rows if length > BASE_CONTEXT})
    main_names, others = [row.name for row in main_rows()], [row.name for row in ablation_rows()]
    tables = [compact(rows, main_names, length) for length in lengths]
    tables += [compact(rows, ["longqlora", *others], length) for length in (lengths[0], BASE_CONTEXT)]
    tables += [by_kind(rows, name, lengths[0]) for name in ("longqlora", "rolled")]
    tables += [by_window(rows, main_names, length, text) for length in lengths for text in texts_of(rows)]
    tables += [
        by_window(sliding, main_names, n, text, ", sliding windows") for n in lengths for text in texts_of(rows)
    ]
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "experiment.md").write_text("\n\n".join(filter(None, tables)) + "\n", encoding="utf-8")
    for length in lengths:
        draw_lengths(rows, length, flags.output / f"experiment_lengths_{length}.png")
    draw_positions(rows, lengths[0], flags.output / "experiment_positions.png")
    for name, sweep in SWEEPS.items():
        draw_sweep(rows, sweep, lengths[0], flags.output / f"experiment_{name}.png")
    origins = {(one["date"], one["hardware"], json.dumps(one["versions"])) for one in read["results"]}
    dates, cards, versions = (sorted(set(column)) for column in zip(*origins, strict=True))
    record = {"commands": sorted({one["command"] for one in read["results"] + read["cost"]}), "dates": dates}
    record |= {"hardware": cards, "versions": [json.loads(one) for one in versions]}
    shown = [
        {"row": name, "length": length, **row, "sliding": sliding[name, length]["perplexity"].get("full")}
        for (name, length), row in rows.items()
    ]
    write_json(flags.output / "experiment.json", record | {"rows": shown})
    print((flags.output / "experiment.md").read_text(encoding="utf-8"))


KEPT = ("results", "cost")
Sweep = tuple[str, float, dict[str, tuple[str, str, str]]]  # axis, number of the main rows, {prefix: (main row, ...)}
S2, YAMLS = ("longqlora", "LongQLoRA", "#0072b2"), ("yarn-last", "our YAMLs: yarn, full attention at last", "#009e73")
SWEEPS: dict[str, Sweep] = {
    "rank": ("LoRA rank", 64, {"rank-": S2, "yarn-last-rank-": YAMLS}),
    "steps": ("steps", 400, {"steps-": S2, "yarn-last-steps-": YAMLS}),
    "groups": ("group / row", 0.25, {"groups-": S2}),
}

if __name__ == "__main__":
    main()
