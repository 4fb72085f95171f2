"""How do memory and speed grow with sequence length? Plots the results of script/benchmark.py.

    python script/performance/plot.py figure/benchmark_fp8.json figure/benchmark.json --overwrite

A row that stands in several files is taken from the first that has it, and there the fastest: with or without
DeepSpeed, CUDA graph and 8-bit optimizer states. Rows that ran out of memory are crosses at the top of the left panel;
rows with their own memory budget are annotated, and drawn as minimum memory below 10 GiB; rows with other overrides
are left out.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", type=Path, nargs="+", metavar="benchmark", help="JSON of script/benchmark.py")
    parser.add_argument("--size", default="7b", help="of the model: 7b or 13b (7b)")
    parser.add_argument("--output", type=Path, default=Path("figure/memory.png"), help="PNG file (figure/memory.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args()


import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from component.error import UserError
from component.storage.claim import claimed
from component.storage.result import save_figure

# kind: (label, colour, marker); blue against orange is safe for color-blind readers
KINDS = {
    "ours_fastest": ("LongQLoRA, fastest in 32 GiB", "#0072b2", "o"),
    "ours_fp8": ("LongQLoRA in FP8", "#009e73", "P"),
    "ours_leanest": ("LongQLoRA, minimum memory", "#56b4e9", "s"),
    "unsloth": ("Unsloth", "#d55e00", "^"),
    "hf": ("transformers + PEFT", "#8a8a8a", "D"),
    "original": ("original LongQLoRA (fp16, no flash)", "#cc79a7", "v"),
}
BUDGET_GIB, LEAN_GIB = 32, 10
SAME_LINE = {"memory_budget_gib", "cuda_graph", "optim"}  # overrides that rows of a line may have


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    with claimed({"--output": [flags.output]}, {"benchmark": flags.benchmarks}, overwrite=flags.overwrite):
        plot(flags)


def plot(flags: argparse.Namespace) -> None:
    results = [json.loads(file.read_text(encoding="utf-8")) for file in flags.benchmarks]
    cards = sorted({result["hardware"] for result in results})
    if len(cards) > 1:
        raise UserError(f"benchmark: measured on {', '.join(cards)}; name files of one card")
    rows: dict[tuple, dict] = {}
    for result in results:
        here: dict[tuple, dict] = {}
        for row in result["rows"]:
            if row["size"] == flags.size and row["overrides"].keys() <= SAME_LINE:
                key = (line_of(row), row["length"])
                here[key] = max(row, here.get(key, row), key=lambda one: one.get("tokens_per_second") or 0)
        rows = here | rows
    title = f"QLoRA of LLaMA2-{flags.size.upper()}, rank 64, one sequence per step, on one {cards[0]}"
    draw({kind: [row for (line, _), row in rows.items() if line == kind] for kind in KINDS}, title, flags.output)


def line_of(row: dict) -> str:
    """The kind whose line shows `row`."""
    kind = row["kind"].replace("_python", "")
    is_lean = kind == "ours_fastest" and row["overrides"].get("memory_budget_gib", BUDGET_GIB) < LEAN_GIB
    return "ours_leanest" if is_lean else kind


def draw(rows_of: dict[str, list[dict]], title: str, file: Path) -> None:
    figure, (memory, speed) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for kind, (label, colour, marker) in KINDS.items():
        done = sorted((row for row in rows_of[kind] if "error" not in row), key=lambda row: row["length"])
        lengths = [row["length"] for row in done]
        style = {"color": colour, "marker": marker, "label": label, "linewidth": 1.8, "markersize": 6}
        if done:
            memory.plot(lengths, [row["peak_reserved_gib"] for row in done], **style)
            speed.plot(lengths, [row["tokens_per_second"] for row in done], **style)
        for row in done:
            if "memory_budget_gib" in row["overrides"]:
                note = f"held to {row['overrides']['memory_budget_gib']} GiB"
                place = (row["length"], row["peak_reserved_gib"])
                memory.annotate(note, place, (0, -14), textcoords="offset points", fontsize=8, ha="center")
        too_long = [row["length"] for row in rows_of[kind] if "out of memory" in row.get("error", "").lower()]
        # x in tokens, y as a share of the panel's height
        memory.plot(too_long, [0.97] * len(too_long), "x", color=colour, transform=memory.get_xaxis_transform())
    memory.axhline(BUDGET_GIB, color="black", linewidth=0.9, linestyle=(0, (5, 4)))
    memory.text(0.01, BUDGET_GIB, f"{BUDGET_GIB} GiB", transform=memory.get_yaxis_transform(), fontsize=9, va="bottom")
    memory.set(title="GPU memory reserved, GiB (x: out of memory)", yscale="log")
    memory.set_ylim(top=1.35 * memory.get_ylim()[1])  # room for the crosses
    gib = [tick for tick in (4, 8, 16, 32, 64, 128) if tick <= memory.get_ylim()[1]]
    memory.set_yticks(gib, [str(tick) for tick in gib])
    speed.set(title="tokens per second", ylim=(0, None))
    lengths = sorted({row["length"] for rows in rows_of.values() for row in rows})
    for axes in (memory, speed):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens per sequence")
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, file)


if __name__ == "__main__":
    main()
