"""What did the experiments show? Tables and figures of the results of script/experiment/run.py.

    python script/experiment/report.py --work output/experiment --output figure

Writes experiment.json (all numbers of each run, its cost, commands and versions), experiment.md (tables: mean and
spread over seeds) and one experiment_*.png per question.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="work folder of run.py, with results/ and cost/")
    parser.add_argument("--output", type=Path, required=True, help="folder for JSON, tables and figures")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args()


import matplotlib

matplotlib.use("Agg")
from component.error import UserError
from component.storage.atomic import atomic_file
from component.storage.claim import claimed
from component.storage.result import write_json
from script.experiment.figure import Sweep, draw_lengths, draw_positions, draw_sweep
from script.experiment.results import Rows, gather, texts_of, values_of
from script.experiment.rows import BASE_CONTEXT, ablation_runs, main_runs

KINDS = {
    "full": "adapter on the 16-bit base",
    "nf4": "adapter on the NF4 base it was trained on",
    "merged-fp16": "merged on the 16-bit base",
    "merged-nf4": "merged on the dequantized base",
    "shift_short": "under S2",
    "rolled": "under rolled S2",
}
KEPT = ("results", "cost")  # folders of --work
S2, YAMLS = (
    ("longqlora", "LongQLoRA", "#0072b2"),
    ("yarn-last", "our YAMLs: yarn, full attention last", "#009e73"),
)
SWEEPS: dict[str, Sweep] = {
    "rank": ("LoRA rank", 64, {"rank-": S2, "yarn-last-rank-": YAMLS}),
    "steps": ("steps", 400, {"steps-": S2, "yarn-last-steps-": YAMLS}),
    "groups": ("group size / sample length", 0.25, {"groups-": S2}),
}


def cell(values: list[float]) -> str:
    """Mean, and ± half the range if there are several seeds."""
    if not values:
        return "-"
    mean = statistics.mean(values)
    if mean > 1000:
        return "> 1000"
    spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    return f"{mean:.2f}{spread}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, or an empty string if it has no rows."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) if rows else ""


def compact(rows: Rows, names: Iterable[str], length: int) -> str:
    """A line per run: perplexity of each text at the base's and at the extended context, and the cost of a step."""
    columns = [(text, window) for text in texts_of(rows) for window in sorted({BASE_CONTEXT, length})]
    head = [f"extended to {length}", *(f"{text} {window}" for text, window in columns), "s/step", "GiB"]
    lines = []
    for row in (rows[name, length] for name in names if (name, length) in rows):
        cells = [cell(values_of(row, text, window)) for text, window in columns]
        cost = [f"{row[key]:.2f}" if row.get(key) else "-" for key in ("step_seconds", "reserved_gib")]
        lines.append([row["says"], *cells, *cost])
    return markdown(head, lines)


def by_window(rows: Rows, names: Iterable[str], length: int, text: str, how: str = "") -> str:
    """A line per run, a column per window length."""
    found = [rows[name, length] for name in names if (name, length) in rows]
    windows = sorted({window for row in found for window in row["perplexity"]["full"].get(text, {})})
    head = [f"{text}, extended to {length}{how}", *map(str, windows)]
    lines = [[row["says"], *(cell(values_of(row, text, window)) for window in windows)] for row in found]
    return markdown(head, lines) if windows else ""


def by_kind(rows: Rows, name: str, length: int) -> str:
    """One run's model, evaluated in several ways."""
    row = rows.get((name, length))
    if row is None or len(row["perplexity"]) < 2:
        return ""
    columns = [(text, window) for text in texts_of(rows) for window in sorted({BASE_CONTEXT, length})]
    head = [row["says"], *(f"{text} {window}" for text, window in columns)]
    lines = [[KINDS[kind], *(cell(values_of(row, t, w, kind)) for t, w in columns)] for kind in row["perplexity"]]
    return markdown(head, lines)


def tables(rows: Rows, sliding: Rows, lengths: list[int]) -> str:
    """All tables in Markdown."""
    main_names, others = [run.name for run in main_runs()], [run.name for run in ablation_runs()]
    found = [compact(rows, main_names, length) for length in lengths]
    found += [compact(rows, ["longqlora", *others], length) for length in (lengths[0], BASE_CONTEXT)]
    found += [by_kind(rows, name, lengths[0]) for name in ("longqlora", "rolled")]
    found += [by_window(rows, main_names, length, text) for length in lengths for text in texts_of(rows)]
    found += [by_window(sliding, main_names, n, text, ", sliding windows") for n in lengths for text in texts_of(rows)]
    return "\n\n".join(filter(None, found)) + "\n"


def record(read: dict[str, list[dict]], rows: Rows, sliding: Rows) -> dict:
    """All numbers of all runs, and where they come from."""
    origins = {(one["date"], one["hardware"], json.dumps(one["versions"])) for one in read["results"]}
    dates, cards, versions = (sorted(set(column)) for column in zip(*origins, strict=True))
    shown = [
        {"row": name, "length": length, **row, "sliding": sliding[name, length]["perplexity"].get("full")}
        for (name, length), row in rows.items()
    ]
    commands = sorted({one["command"] for one in read["results"] + read["cost"]})
    versions = [json.loads(one) for one in versions]
    return {"commands": commands, "dates": dates, "hardware": cards, "versions": versions, "rows": shown}


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    files = {kind: sorted((flags.work / kind).glob("*.json")) for kind in KEPT}
    if not files["results"]:
        raise UserError(f"--work: {flags.work}/results holds no results; run script/experiment/run.py first")
    read = {kind: [json.loads(file.read_text(encoding="utf-8")) for file in files[kind]] for kind in KEPT}
    rows, sliding = gather(read["results"], read["cost"], "longlora"), gather(read["results"], [], "sliding")
    lengths = sorted({length for _, length in rows if length > BASE_CONTEXT})
    names = [*(f"lengths_{length}" for length in lengths), "positions", *SWEEPS]
    figures = {name: flags.output / f"experiment_{name}.png" for name in names}
    table, numbers = flags.output / "experiment.md", flags.output / "experiment.json"
    written = {"--output": [table, numbers, *figures.values()]}
    with claimed(written, {"--work": [*files["results"], *files["cost"]]}, overwrite=flags.overwrite):
        with atomic_file(table) as writing:
            writing.write_text(tables(rows, sliding, lengths), encoding="utf-8")
        for length in lengths:
            draw_lengths(rows, length, figures[f"lengths_{length}"])
        draw_positions(rows, lengths[0], figures["positions"])
        for name, sweep in SWEEPS.items():
            draw_sweep(rows, sweep, lengths[0], figures[name])
        write_json(numbers, record(read, rows, sliding))
    print(table.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
