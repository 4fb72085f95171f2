"""How do speed and memory change with the number of GPUs? Plots results of script/benchmark.py with several `cards`.

    python script/performance/plot_scaling.py figure/scaling.json --output figure/scaling.png --overwrite

One line for each model, length and attention; dashed: the speed of one GPU times the number of GPUs.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("benchmark", type=Path, help="JSON of script/benchmark.py")
    parser.add_argument("--output", type=Path, default=Path("figure/scaling.png"), help="PNG (figure/scaling.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args()


import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from component.storage.claim import claimed
from component.storage.result import save_figure

COLOURS = ("#0072b2", "#d55e00", "#56b4e9", "#cc79a7", "#009e73", "#e69f00", "#8a8a8a", "#000000")  # Okabe, Ito
BUDGET_GIB = 32


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    with claimed({"--output": [flags.output]}, {"benchmark": [flags.benchmark]}, overwrite=flags.overwrite):
        results = json.loads(flags.benchmark.read_text(encoding="utf-8"))
        draw(series(results["rows"]), f"QLoRA of LLaMA2, rank 64, on {results['hardware']}", flags.output)


def series(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each line, by number of GPUs; those of one GPU belong to every line of their model and length."""
    done = [row for row in rows if "error" not in row]
    lines: dict[str, list[dict]] = {label(row): [] for row in done if row["cards"] > 1}
    for row in sorted(done, key=lambda row: (row["size"], row["length"], row["cards"])):
        alone = [name for name in lines if name.startswith(about(row))] or [about(row)]
        for name in alone if row["cards"] == 1 else [label(row)]:
            lines.setdefault(name, []).append(row)
    return lines


def about(row: dict) -> str:
    attention = "S2-Attn" if row["overrides"].get("use_shift_short_attention", True) else "full attention"
    return f"{row['size'].upper()}, {row['length']} tokens, {attention}"


def label(row: dict) -> str:
    """What a line is called; the number of GPUs that share a row says how `row` was trained."""
    if row["cards"] == 1:
        return about(row)
    is_split = row["overrides"].get("sequence_parallel_size", 1) > 1
    way = "each row split by heads" if row["kind"].endswith("by_heads") else "each row split"
    return f"{about(row)}, {way if is_split else 'a row per GPU'}"


def draw(lines: dict[str, list[dict]], title: str, file: Path) -> None:
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for (name, rows), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
        cards = [row["cards"] for row in rows]
        style = {"color": colour, "marker": "o", "linewidth": 1.8, "markersize": 6, "label": name}
        speed.plot(cards, [row["tokens_per_second"] for row in rows], **style)
        memory.plot(cards, [row["peak_reserved_gib"] for row in rows], **style)
        if cards[0] == 1 and len(cards) > 1:
            ideal = [rows[0]["tokens_per_second"] * count for count in cards]
            speed.plot(cards, ideal, color=colour, linewidth=0.9, linestyle=(0, (5, 4)))
    memory.axhline(BUDGET_GIB, color="black", linewidth=0.9, linestyle=(0, (5, 4)))
    speed.set(title="tokens per second, all GPUs", yscale="log")
    memory.set(title="GiB reserved per GPU (that with the most)", ylim=(0, 1.1 * BUDGET_GIB))
    ticks = sorted({row["cards"] for rows in lines.values() for row in rows})
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(count) for count in ticks])
        axes.minorticks_off()
        axes.set_xlabel("GPUs")
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    rates = [
        tick
        for tick in (1000, 2000, 4000, 8000, 16000, 32000, 64000)
        if speed.get_ylim()[0] <= tick <= speed.get_ylim()[1]
    ]
    speed.set_yticks(rates, [f"{tick:,}" for tick in rates])
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, file)


if __name__ == "__main__":
    main()
