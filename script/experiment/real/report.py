"""What did the experiments on a real model show? Tables and a figure of the results of script/experiment/real/run.py.

    python script/experiment/real/report.py --work output/real --output figure

Writes real_model.json (all numbers of each row, its settings, command, card, date and versions; the key tokens of
LongPPL), real_model.md (tables) and perplexity.png (by window length). Scores of RULER stand beside those of the same
samples under full attention, with the 95 % interval of the difference (bootstrap over samples).
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="work folder of run.py, with results/")
    parser.add_argument("--output", type=Path, required=True, help="folder for JSON, tables and figure")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args()


import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from component.error import UserError
from component.storage.atomic import atomic_file
from component.storage.claim import claimed
from component.storage.result import save_figure, write_json
from script.experiment.real.rows import all_rows
from script.experiment.report import cell, markdown

NAMES = ("real_model.json", "real_model.md", "perplexity.png")
REFERENCE = "full-attention"  # the row that others are compared with
DRAWS = 2000
ABLE = 50  # % of a task's score
DRAWN = {  # row -> color, marker
    "base": ("#8a8a8a", "x"),
    "untrained-yarn": ("#cc79a7", "v"),
    "paper": ("#0072b2", "o"),
    "ours": ("#009e73", "s"),
    "last-0.25": ("#56b4e9", "^"),
    "full-attention": ("#d55e00", "D"),
}
Results = dict[str, list[dict[str, Any]]]  # by row, in the order of seeds


def read_results(folder: Path) -> Results:
    found: Results = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(result["row"], []).append(result)
    return {name: sorted(found[name], key=lambda result: result["seed"]) for name in all_rows() if name in found}


def perplexities(seeds: list[dict], text: str, window: int) -> list[float]:
    """One for each seed that has it."""
    entries = (entry for result in seeds for entry in result["perplexity"].get(text, ()))
    return [entry["perplexity"] or float("inf") for entry in entries if entry["seq_len"] == window]


def long_perplexities(seeds: list[dict], text: str) -> list[float]:
    """LongPPL at the extended length, one for each seed that has it."""
    pairs = ((result, entry) for result in seeds for entry in result["perplexity"].get(text, ()))
    at_length = (entry for result, entry in pairs if entry["seq_len"] == result["length"])
    return [entry["long_ppl"] for entry in at_length if entry.get("long_ppl")]


def perplexity_table(results: Results) -> str:
    columns = sorted(
        {
            (text, entry["seq_len"])
            for seeds in results.values()
            for text, entries in seeds[0]["perplexity"].items()
            for entry in entries
        }
    )
    texts = sorted({text for text, _ in columns if any(long_perplexities(seeds, text) for seeds in results.values())})
    lines = []
    for seeds in results.values():
        cells = [cell(perplexities(seeds, *column)) for column in columns]
        cells += [cell(long_perplexities(seeds, text)) for text in texts]
        lines.append([seeds[0]["label"], *cells, *_cost(seeds[0])])
    head = [*(f"{text} {window}" for text, window in columns), *(f"{text} LongPPL" for text in texts)]
    return markdown(["perplexity", *head, "s/step", "GiB", "M tokens", "to 1 %"], lines)


def _cost(result: dict) -> list[str]:
    """Median seconds of a step, unless others ran on the same GPU; memory; tokens, and those until near the end."""
    training = result.get("training", {})
    seconds = training.get("step_seconds", [])[1:] if result.get("rows_per_gpu") == 1 else []
    tokens = training.get("num_input_tokens_seen")
    near = tokens_until_near(result)
    millions = [None if number is None else number / 1e6 for number in (tokens, near)]
    found = (statistics.median(seconds) if seconds else None, training.get("peak_reserved_gib"), *millions)
    return ["-" if value is None else f"{value:.{digits}f}" for value, digits in zip(found, (2, 1, 1, 1), strict=True)]


def tokens_until_near(result: dict, share: float = 0.01) -> float | None:
    """Tokens trained on until the perplexity of held-out texts stays within `share` of the last one."""
    evaluations = result.get("eval_losses", [])
    if len(evaluations) < 2:
        return None
    limit = evaluations[-1][1] + math.log1p(share)
    far = [step for step, loss in evaluations if loss > limit]
    near = next(step for step, _ in evaluations if step > max(far, default=-1))
    return result["training"]["num_input_tokens_seen"] * near / result["settings"]["max_steps"]


def scores(result: dict) -> dict[tuple[str, int, int], float]:
    """RULER's score of each trial in %, by (task, length, sample)."""
    return {
        (trial["task"], trial["length"], trial["sample"]): 100 * trial["score"]
        for trial in result.get("ruler", {}).get("trials", ())
    }


def difference(mine: dict, theirs: dict, length: int) -> tuple[float, float, float] | None:
    """Mean difference of the scores of the same trials at `length`, and its 95 % interval; None without any."""
    shared = [key for key in sorted(mine.keys() & theirs.keys()) if key[1] == length]
    if not shared:
        return None
    gaps = np.array([mine[key] - theirs[key] for key in shared])
    draws = np.random.default_rng(0).integers(0, len(gaps), (DRAWS, len(gaps)))
    low, high = np.percentile(gaps[draws].mean(1), [2.5, 97.5])
    return float(gaps.mean()), float(low), float(high)


def able_tasks(results: Results) -> list[str]:
    """The tasks of which the base scores at least ABLE % at the shortest length: only these can tell rows apart."""
    trials = scores(results["base"][0]) if "base" in results else {}
    shortest = min((key[1] for key in trials), default=0)
    by_task: dict[str, list[float]] = {}
    for (task, length, _), score in trials.items():
        if length == shortest:
            by_task.setdefault(task, []).append(score)
    return sorted(task for task, found in by_task.items() if statistics.mean(found) >= ABLE)


def mean_of(trials: dict[tuple[str, int, int], float], tasks: list[str], length: int) -> float | None:
    """Of all `tasks` at `length`; None where one was not run: a mean of the others can't be compared."""
    if {key[0] for key in trials if key[1] == length} != set(tasks):
        return None
    return statistics.mean([score for key, score in trials.items() if key[1] == length])


def shown_mean(mean: float | None) -> str:
    return "-" if mean is None else f"{mean:.1f}"


def able_table(results: Results) -> str:
    """Means over those tasks by length, each against the length before, and the last against full attention."""
    tasks = able_tasks(results)
    found = {name: scores(seeds[0]) for name, seeds in results.items() if "ruler" in seeds[0]}
    found = {name: {key: score for key, score in trials.items() if key[0] in tasks} for name, trials in found.items()}
    lengths = sorted({key[1] for trials in found.values() for key in trials})
    lines = []
    for name, trials in found.items():
        means = [mean_of(trials, tasks, length) for length in lengths]
        before, last = means[-2:] if len(means) > 1 else (None, None)
        ratio = f"{last / before:.2f}" if last is not None and before else "-"
        gap = difference(trials, found.get(REFERENCE, {}), lengths[-1]) if lengths else None
        shown = "-" if gap is None or name == REFERENCE else f"{gap[0]:+.1f} ({gap[1]:+.1f} to {gap[2]:+.1f})"
        lines.append([results[name][0]["label"], *map(shown_mean, means), ratio, shown])
    if not tasks or not lines:
        return ""
    compared = f"{lengths[-1]} / {lengths[-2]}" if len(lengths) > 1 else "-"
    head = [f"RULER: {', '.join(tasks)}", *map(str, lengths), compared, "against full attention"]
    return markdown(head, lines)


def ruler_tables(results: Results) -> list[str]:
    """Scores by task, a table per length; and the means, with the difference from full attention in trials of both."""
    found = {name: scores(seeds[0]) for name, seeds in results.items() if "ruler" in seeds[0]}
    tasks = sorted({key[0] for trials in found.values() for key in trials})
    lengths = sorted({key[1] for trials in found.values() for key in trials})
    tables = []
    for length in lengths:
        lines = []
        for name, trials in found.items():
            by_task = [[score for key, score in trials.items() if key[:2] == (task, length)] for task in tasks]
            mean = shown_mean(mean_of(trials, tasks, length))
            gap = difference(trials, found.get(REFERENCE, {}), length)
            shown = "-" if gap is None or name == REFERENCE else f"{gap[0]:+.1f} ({gap[1]:+.1f} to {gap[2]:+.1f})"
            cells = [f"{statistics.mean(scored):.0f}" if scored else "-" for scored in by_task]
            lines.append([results[name][0]["label"], *cells, mean, shown])
        tables.append(markdown([f"RULER at {length}", *tasks, "mean", "against full attention"], lines))
    return tables


def draw(results: Results, file: Path) -> None:
    """Perplexity by window length; lines of untrained rows may leave the frame."""
    texts = sorted({text for seeds in results.values() for text in seeds[0]["perplexity"]} - {"other"})
    texts = [
        text for text in texts if any(text in results[name][0]["perplexity"] for name in DRAWN if name in results)
    ]
    drawn = {name: style for name, style in DRAWN.items() if name in results}
    figure, panels = plt.subplots(1, len(texts), figsize=(5.5 * len(texts), 4.6), layout="constrained", squeeze=False)
    for axes, text in zip(panels[0], texts, strict=True):
        trained = []
        for name, (color, marker) in drawn.items():
            entries = results[name][0]["perplexity"].get(text, ())
            windows = sorted({entry["seq_len"] for entry in entries})
            values = [statistics.mean(perplexities(results[name], text, window)) for window in windows]
            trained += values if results[name][0].get("training") else []
            axes.plot(windows, values, color=color, marker=marker, label=all_rows()[name].label.replace("**", ""))
        if trained:
            axes.set_ylim(0.95 * min(trained), 1.1 * max(trained))
        axes.set(xscale="log", title=text, xlabel="tokens per window", ylabel="perplexity")
        axes.set_xticks(sorted({line for drawn in axes.lines for line in drawn.get_xdata()}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, file)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    results = read_results(flags.work / "results")
    if not results:
        raise UserError(f"--work: {flags.work}/results holds no results; run script/experiment/real/run.py first")
    flags.output.mkdir(parents=True, exist_ok=True)
    written = {"--output": [flags.output / name for name in NAMES]}
    with claimed(written, {"--work": sorted((flags.work / "results").glob("*.json"))}, overwrite=flags.overwrite):
        tables = [perplexity_table(results), able_table(results), *ruler_tables(results)]
        with atomic_file(flags.output / NAMES[1]) as file:
            file.write_text("\n\n".join(filter(None, tables)) + "\n", encoding="utf-8")
        draw(results, flags.output / NAMES[2])
        texts = flags.work / "data/texts.json"
        described = json.loads(texts.read_text(encoding="utf-8")) if texts.exists() else {}
        rows = [result for seeds in results.values() for result in seeds]
        files = sorted((flags.work / "data").glob("keys-*.json"))
        keys = {file.stem.removeprefix("keys-"): json.loads(file.read_text(encoding="utf-8")) for file in files}
        write_json(flags.output / NAMES[0], {**described, "key_tokens": keys, "rows": rows})
    print(f"{sum(map(len, results.values()))} results -> {', '.join(str(flags.output / name) for name in NAMES)}")


if __name__ == "__main__":
    main()
