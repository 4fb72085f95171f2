"""How are text lengths distributed? As statistics (JSON) and a histogram (PNG)."""

import math
from pathlib import Path

import numpy as np

from component.storage.result import save_figure

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
BINS = 40
BLUE, DARK = "#0072b2", "#d55e00"


def describe_lengths(tokens: list[int] | np.ndarray) -> dict:
    """Count, sum, extremes, mean, percentiles and a histogram of lengths in tokens; for no texts, count and sum."""
    lengths = np.asarray(tokens, dtype=np.int64)
    if not len(lengths):
        return {"texts": 0, "tokens": 0}
    edges = _edges(int(lengths.min()), int(lengths.max()))
    return {
        "texts": len(lengths),
        "tokens": int(lengths.sum()),
        "min": int(lengths.min()),
        "mean": round(float(lengths.mean()), 1),
        "median": float(np.median(lengths)),
        "max": int(lengths.max()),
        "percentiles": {
            str(p): round(float(value), 1)
            for p, value in zip(PERCENTILES, np.percentile(lengths, PERCENTILES), strict=True)
        },
        "histogram": {"edges": edges, "texts": np.histogram(lengths, edges)[0].tolist()},
    }


def _edges(low: int, high: int) -> list[int]:
    """Bin edges at round numbers, at most BINS + 2 of them."""
    width = max(1, (high - low) / BINS)
    power = 10 ** math.floor(math.log10(width))
    step = max(
        1, int(next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= width and power * m == int(power * m)))
    )
    return list(range(low // step * step, high + step + 1, step))


def draw_lengths(lengths_of: dict[str, dict], file: Path, title: str) -> None:
    """One histogram per name of `lengths_of` (values of describe_lengths), with a shared axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shown = {name: lengths for name, lengths in lengths_of.items() if lengths["texts"]}
    columns = min(3, len(shown)) or 1
    rows = math.ceil(len(shown) / columns) or 1
    size = (7.5, 4.2) if len(shown) <= 1 else (4 * columns, 0.6 + 2.8 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True)
    thousands = FuncFormatter(lambda value, _: f"{value:,.0f}")
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, (name, lengths) in zip(grid.flat, shown.items(), strict=False):
        edges, counts = lengths["histogram"]["edges"], lengths["histogram"]["texts"]
        axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.85)
        axes.axvline(lengths["median"], color=DARK, linewidth=1.4)
        side = "left" if lengths["median"] < sum(lengths_span(shown)) / 2 else "right"
        label = f" median {lengths['median']:,.0f} "
        axes.text(lengths["median"], 0.97, label, color=DARK, ha=side, va="top", transform=axes.get_xaxis_transform())
        if len(shown) > 1:
            axes.set_title(f"{name}: {lengths['texts']:,}", fontsize=10, parse_math=False)
        axes.set_ylim(bottom=0, top=1.12 * max(counts))
        axes.xaxis.set_major_formatter(thousands)
        axes.xaxis.set_major_locator(MaxNLocator(6 if len(shown) <= 1 else 4))
        axes.yaxis.set_major_formatter(thousands)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.tick_params(labelbottom=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("tokens in a text", fontsize=10)
    figure.supylabel("texts", fontsize=10)
    figure.suptitle(title, fontsize=11, parse_math=False)
    save_figure(figure, file)
    plt.close(figure)


def lengths_span(lengths_of: dict[str, dict]) -> tuple[int, int]:
    return min(each["min"] for each in lengths_of.values()), max(each["max"] for each in lengths_of.values())
