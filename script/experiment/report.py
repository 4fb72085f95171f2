"""Tables and figures of the experiments, from the results that script/experiment/run.py left.

    python script/experiment/report.py --results output/experiment/results --output figure

Writes experiment.json (the numbers of every row: mean and spread over seeds), experiment.md (tables for README.md) and
one PNG per question.
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from component.error import UserError, exit_on_user_error
from component.result import write_json
from script.experiment.rows import ablation_rows, main_rows

SHOWN = {  # of the figure by length: row -> (label, colour, marker)
    "base": ("base", "#8a8a8a", "x"),
    "untrained-linear": ("interpolated, untrained", "#cc79a7", "v"),
    "longqlora": ("LongQLoRA", "#0072b2", "o"),
    "full-attention": ("the same, full attention", "#56b4e9", "s"),
    "longlora": ("LongLoRA's setting", "#e69f00", "^"),
    "full": ("full fine-tuning", "#d55e00", "D"),
}
Values = list[float]


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of run.py's results")
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON, the tables and the figures")
    parser.add_argument("--protocol", default="longlora", help="of the tables and figures (longlora)")
    return parser.parse_args()


def gather(results: list[dict], protocol: str) -> dict[tuple[str, int], dict]:
    """{(row, length extended to): {"says", "texts": {text: {window: perplexities of the seeds}}, cost}}."""
    rows: dict[tuple[str, int], dict] = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        row = rows.setdefault((result["row"], result["length"]), {"says": result["says"], "seeds": [], "texts": {}})
        row["seeds"].append(result["seed"])
        for text, measured in result["evaluation"].items():
            by_window = row["texts"].setdefault(text, defaultdict(list))
            for entry in measured[protocol]:
                by_window[entry["seq_len"]].append(entry["perplexity"])
            longest = max(measured[protocol], key=lambda entry: entry["seq_len"])
            row.setdefault("by_position", {})[text] = longest.get("by_position")
        if "training" in result:
            seconds = result["training"]["step_seconds"][1:]
            row.setdefault("step_seconds", []).append(statistics.median(seconds) if seconds else math.nan)
            row.setdefault("reserved_gib", []).append(result["training"].get("peak_reserved_gib"))
    return rows


def cell(values: Values) -> str:
    """Mean, and half of the range where there are several seeds."""
    if not values or any(value is None for value in values):
        return "-"
    mean = statistics.mean(values)
    if mean > 1000:
        return "> 1000"
    spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    return f"{mean:.2f}{spread}"


def table(rows: dict[tuple[str, int], dict], names: list[str], length: int, text: str) -> str:
    """Markdown: one line per row, one column per window."""
    found = [rows[name, length] for name in names if (name, length) in rows]
    if not found:
        return ""
    windows = sorted({window for row in found for window in row["texts"].get(text, {})})
    lines = [f"| {text}, extended to {length} | " + " | ".join(map(str, windows)) + " | s/step | GiB |"]
    lines.append("|" + "---|" * (len(windows) + 3))
    for row in found:
        cells = [cell(row["texts"].get(text, {}).get(window, [])) for window in windows]
        seconds, gib = row.get("step_seconds"), row.get("reserved_gib")
        cells.append(f"{statistics.mean(seconds):.2f}" if seconds else "-")
        cells.append(f"{max(gib):.1f}" if gib and None not in gib else "-")
        lines.append(f"| {row['says']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_lengths(rows: dict[tuple[str, int], dict], length: int, file: Path) -> None:
    """Perplexity against the window, a panel per text."""
    texts = sorted({text for (_, n), row in rows.items() if n == length for text in row["texts"]})
    figure, panels = plt.subplots(1, len(texts), figsize=(5.5 * len(texts), 4.4), layout="constrained", squeeze=False)
    for axes, text in zip(panels[0], texts, strict=True):
        for name, (label, colour, marker) in SHOWN.items():
            measured = rows.get((name, length), {}).get("texts", {}).get(text, {})
            points = {w: statistics.mean(v) for w, v in sorted(measured.items()) if v and None not in v}
            if points:
                axes.plot(list(points), list(points.values()), color=colour, marker=marker, label=label, linewidth=1.6)
        axes.set(title=text, xscale="log", yscale="log", xlabel="tokens of the window", ylabel="perplexity")
        windows = sorted({w for row in rows.values() for w in row["texts"].get(text, {})})
        axes.set_xticks(windows, [str(w) for w in windows])
        axes.minorticks_off()
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_sweep(rows: dict[tuple[str, int], dict], prefix: str, base: float, length: int, file: Path) -> None:
    """Perplexity at the extended length against a number in rows' names; LongQLoRA's own value is `base`."""
    found: dict[float, dict] = {}
    for (name, n), row in rows.items():
        number = name.removeprefix(prefix)
        if n == length and name.startswith(prefix) and number.replace(".", "", 1).isdigit():
            found[float(number)] = row
    if ("longqlora", length) in rows:
        found[base] = rows["longqlora", length]
    if len(found) < 2:
        return
    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for text in sorted(next(iter(found.values()))["texts"]):
        points = {x: statistics.mean(row["texts"][text][length]) for x, row in sorted(found.items())}
        axes.plot(list(points), list(points.values()), marker="o", label=text, linewidth=1.6)
    axes.set(xscale="log", xlabel=prefix.strip("-"), ylabel=f"perplexity at {length} tokens")
    axes.set_xticks(sorted(found), [f"{x:g}" for x in sorted(found)])
    axes.minorticks_off()
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(flags.results.glob("*.json"))]
    if not results:
        raise UserError(f"--results: {flags.results} holds no result; run script/experiment/run.py first")
    rows = gather(results, flags.protocol)
    lengths = sorted({length for _, length in rows})
    texts = sorted({text for row in rows.values() for text in row["texts"]})
    groups = [[row.name for row in main_rows()], ["longqlora", *(row.name for row in ablation_rows())]]
    tables = [table(rows, names, length, text) for names in groups for length in lengths for text in texts]
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "experiment.md").write_text("\n\n".join(filter(None, tables)) + "\n", encoding="utf-8")
    for length in lengths:
        draw_lengths(rows, length, flags.output / f"experiment_lengths_{length}.png")
    for prefix, base in (("rank-", 64), ("steps-", 400), ("groups-", 0.25)):
        draw_sweep(rows, prefix, base, lengths[0], flags.output / f"experiment_{prefix}{lengths[0]}.png")
    shown = [{"row": name, "length": length, **row} for (name, length), row in rows.items()]
    kept = ("date", "hardware", "versions")
    write_json(flags.output / "experiment.json", {key: results[0][key] for key in kept} | {"rows": shown})
    print((flags.output / "experiment.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
