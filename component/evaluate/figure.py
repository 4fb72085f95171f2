"""How are results drawn? Passkey retrieval and RULER as heat maps, perplexity by length and by position."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from component.storage.result import save_figure


def heat_map(axes: Axes, shares: list[list[float]], depths: list[float], lengths: list[int], context: int) -> QuadMesh:
    """Passkeys: a row per depth, a column per length, and a line where the model's context ends."""
    image = share_map(axes, shares, [f"{100 * depth:.0f} %" for depth in depths], lengths, context)
    axes.set_ylabel("depth of the passkey in the text")
    return image


def share_map(axes: Axes, shares: list[list[float]], names: list[str], lengths: list[int], context: int) -> QuadMesh:
    """Shares from 0 to 1 in percent: a row per name, a column per length, and a line where the context ends."""
    image = axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    axes.invert_yaxis()  # the first row at the top
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            color = "black" if share > 0.55 else "white"
            center = (column + 0.5, row + 0.5)
            axes.annotate(f"{100 * share:.0f}", center, ha="center", va="center", fontsize=8.5, color=color)
    if has_context_line(lengths, context):
        axes.axvline(sum(length <= context for length in lengths), color="#d55e00", linewidth=3)
    axes.set_xticks([place + 0.5 for place in range(len(lengths))], [str(length) for length in lengths])
    axes.set_yticks([place + 0.5 for place in range(len(names))], names)
    axes.set_xlabel("prompt length in tokens")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def has_context_line(lengths: list[int], context: int) -> bool:
    """Whether the context ends between the shortest and the longest length."""
    return min(lengths) <= context < max(lengths)


def colour_bar(figure: Figure, image: QuadMesh, axes: Any) -> None:
    bar = figure.colorbar(image, ax=axes, format=lambda share, _: f"{100 * share:.0f} %", shrink=0.9)
    bar.outline.set_visible(False)  # type: ignore[operator]


def draw(shares: list[list[float]], depths: list[float], lengths: list[int], context: int, file: str) -> None:
    """Passkey retrieval by depth and length."""
    figure, axes = _map_axes(len(depths), len(lengths))
    image = heat_map(axes, shares, depths, lengths, context)
    _save_map(figure, axes, image, "Passkey retrieval accuracy, %", lengths, context, file)


def draw_tasks(scores: list[list[float]], tasks: list[str], lengths: list[int], context: int, file: str) -> None:
    """RULER's scores by task and length."""
    figure, axes = _map_axes(len(tasks), len(lengths))
    image = share_map(axes, scores, tasks, lengths, context)
    _save_map(figure, axes, image, "Score of RULER's tasks, %", lengths, context, file)


def _map_axes(rows: int, columns: int) -> tuple[Figure, Axes]:
    width, height = max(2.6 + 0.6 * columns, 5.2), max(1.7 + 0.32 * rows, 3.0)
    return plt.subplots(figsize=(width, height), layout="constrained")


def _save_map(
    figure: Figure, axes: Axes, image: QuadMesh, title: str, lengths: list[int], context: int, file: str
) -> None:
    colour_bar(figure, image, axes)
    line = f" (orange line: end of the model's context of {context} tokens)"
    figure.suptitle(title + line * has_context_line(lengths, context), fontsize=10)
    save_figure(figure, file)


def longest_shared(models: list[dict[str, Any]]) -> int | None:
    """The longest length for which all models have results by position, if there is one."""
    lengths = [{row["seq_len"] for row in model["rows"] if row.get("by_position")} for model in models]
    return max(set.intersection(*lengths), default=None)


def draw_lengths(panel: Axes, model: dict[str, Any], style: dict[str, Any]) -> None:
    rows = [row for row in model["rows"] if row["perplexity"] is not None]
    panel.plot([row["seq_len"] for row in rows], [row["perplexity"] for row in rows], label=model["name"], **style)


def draw_positions(panel: Axes, model: dict[str, Any], length: int, style: dict[str, Any]) -> None:
    """One point per bucket, at its middle."""
    (row,) = [row for row in model["rows"] if row["seq_len"] == length][:1]
    buckets = [bucket for bucket in row["by_position"] if bucket["tokens"] and bucket["perplexity"] is not None]
    middles = [(bucket["start"] + bucket["end"]) / 2 for bucket in buckets]
    panel.plot(middles, [bucket["perplexity"] for bucket in buckets], **style)


def finish(panel: Axes) -> None:
    """A logarithmic perplexity axis with plain numbers."""
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(axis="y", color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
