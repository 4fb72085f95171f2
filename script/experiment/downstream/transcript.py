"""How are model outputs drawn as a picture? As blocks of wrapped text, one or two side by side."""

from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

WIDTH, MARGIN, GAP, INDENT = 11.0, 0.35, 0.4, 0.14  # inches
POINTS, LINE = 10.0, 1.4  # font size, and line height as a multiple of it
DPI = 130  # as in component.storage.result.save_figure
INK, PALE = "0.15", "0.8"


@dataclass
class Block:
    title: str
    text: str
    colour: str
    note: str = ""  # below the text, in the title's color


class Measure:
    """Width of rendered text in inches."""

    def __init__(self) -> None:
        self.renderer = RendererAgg(1, 1, DPI)

    def width(self, text: str, points: float = POINTS, weight: str = "normal") -> float:
        font = FontProperties(size=points, weight=weight)
        return self.renderer.get_text_width_height_descent(text, font, ismath=False)[0] / DPI

    def wrap(self, text: str, width: float, points: float = POINTS, weight: str = "normal") -> list[str]:
        """Lines of at most `width` inches, broken at spaces; words wider than a line are split."""
        lines = [""]
        for written in text.split():
            word = "".join(letter if letter.isprintable() else "\ufffd" for letter in written)
            joined = f"{lines[-1]} {word}".strip()
            if self.width(joined, points, weight) <= width:
                lines[-1] = joined
                continue
            lines += [""] if lines[-1] else []
            for letter in word:
                if self.width(lines[-1] + letter, points, weight) > width:
                    lines.append("")
                lines[-1] += letter
        return lines


def draw(title: str, rows: list[list[Block]], caption: str) -> Figure:
    """Stack `rows`, with the blocks of a row side by side; an empty row is a horizontal line."""
    measure, lines, bars = Measure(), [], []  # (x, baseline, text, points, weight, colour) and (xs, ys, colour)
    inner, step = WIDTH - 2 * MARGIN, LINE * POINTS / 72

    def put(text: str, x: float, y: float, width: float, colour: str, points: float = POINTS, weight: str = "normal"):
        """Add wrapped text; returns the y below it."""
        for line in measure.wrap(text, width * 0.99, points, weight):
            lines.append((x, y + points / 72, line, points, weight, colour))
            y += LINE * points / 72
        return y

    y = put(title, MARGIN, MARGIN, inner, INK, 13, "bold") + step / 2
    for row in rows:
        if not row:
            bars.append(((MARGIN, WIDTH - MARGIN), (y, y), PALE))
            y += step
            continue
        width = (inner - GAP * (len(row) - 1)) / len(row)
        ends = []
        for place, block in enumerate(row):
            x = MARGIN + place * (width + GAP)
            end = put(block.title, x + INDENT, y, width - INDENT, block.colour, POINTS, "bold")
            end = put(block.text, x + INDENT, end, width - INDENT, INK)
            if block.note:
                end = put(block.note, x + INDENT, end + step / 4, width - INDENT, block.colour, 9)
            bars.append(((x, x), (y, end), block.colour))
            ends.append(end)
        y = max(ends) + step * 0.9
    height = put(caption, MARGIN, y, inner, "0.35", 9) + MARGIN
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    for x, baseline, text, points, weight, colour in lines:
        font = FontProperties(size=points, weight=weight)
        written = figure.text(x / WIDTH, 1 - baseline / height, text, fontproperties=font, color=colour)
        written.set_parse_math(False)  # a price in dollars is not a formula
    for across, down, colour in bars:
        ends_at = [1 - place / height for place in down]
        figure.add_artist(Line2D([place / WIDTH for place in across], ends_at, color=colour, linewidth=2))
    return figure
