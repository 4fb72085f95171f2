"""How are the experiments' results plotted: by window length, by position, and over one swept setting?"""

import statistics
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt

from component.storage.result import save_figure
from script.experiment.results import BY_POSITION, LEVELS, SHOWN, Rows, texts_of, values_of
from script.experiment.rows import BASE_CONTEXT

# (axis label, value of the main runs, {prefix of swept runs: (main run, label, color)})
Sweep = tuple[str, float, dict[str, tuple[str, str, str]]]


def panels(rows: Rows, title: str = "{}", lines: int = 1):
    """A figure with a column of `lines` panels per text, and [(panels, text)]."""
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
    """Perplexity by window length: all runs above, zoomed in on the base's own perplexity below."""
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
        below.set(xlabel="tokens per window", ylim=(low - 0.1 * (high - low), high + 0.1 * (high - low)))
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


def draw_sweep(rows: Rows, sweep: Sweep, length: int, file: Path) -> None:
    """Perplexity at the extended length against the number in the runs' names, one line per prefix.

    Uses the first seed, which all runs have: the same initial weights and order of texts.
    """
    label, own, series = sweep
    figure, parts = panels(rows, f"{{}}, windows of {length} tokens")
    numbers = set()
    for (axes,), text in parts:
        for prefix, (main, legend, colour) in series.items():
            found: dict[float, dict] = {own: rows[main, length]} if (main, length) in rows else {}
            for (name, n), row in rows.items():
                number = name.removeprefix(prefix)
                if n == length and name.startswith(prefix) and number.replace(".", "", 1).isdigit():
                    found[float(number)] = row
            points = {x: values[0] for x, row in sorted(found.items()) if (values := values_of(row, text, length))}
            if len(points) > 1:
                axes.plot(list(points), list(points.values()), color=colour, marker="o", linewidth=1.6, label=legend)
                numbers |= set(points)
        for name, (legend, colour) in LEVELS.items():
            level = values_of(rows.get((name, length)), text, length)[:1]
            if level:
                axes.axhline(level[0], color=colour, linestyle="--", linewidth=1.2, label=legend)
        axes.set(xlabel=label)
        ticks(axes, numbers)
    if numbers:
        finish(figure, parts[0][0][0], file)
    plt.close(figure)
