"""How do people read what models wrote? Blocks of wrapped text, one or two beside each other, drawn as a picture."""

from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

WIDTH, MARGIN, GAP, INDENT = 11.0, 0.35, 0.4, 0.14  # inches
POINTS, LINE = 10.0, 1.4  # size of the text, and from one line to the next as a multiple of it
DPI = 130  # as component.storage.result.save_figure
INK, PALE = "0.15", "0.8"


@dataclass
class Block:
    title: str
    text: str
    colour: str
    note: str = ""  # under the text, in the title's colour


class Measure:
    """How wide is a text, in inches? As the picture will have it."""

    def __init__(self) -> None:
        self.renderer = RendererAgg(1, 1, DPI)

    def width(self, text: str, points: float = POINTS, weight: str = "normal") -> float:
        font = FontProperties(size=points, weight=weight)
        return self.renderer.get_text_width_height_descent(text, font, ismath=False)[0] / DPI

    def wrap(self, text: str, width: float, points: float = POINTS, weight: str = "normal") -> list[str]:
        """Lines of at most `width` inches, broken at spaces; inside words only where one is wider than a line."""
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
    """`rows` under each other, the blocks of a row beside each other; an empty row is a line across the picture."""
    measure, lines, bars = Measure(), [], []  # (x, baseline, text, points, weight, colour) and (xs, ys, colour)
    inner, step = WIDTH - 2 * MARGIN, LINE * POINTS / 72

    def put(text: str, x: float, y: float, width: float, colour: str, points: float = POINTS, weight: str = "normal"):
        """The y below the wrapped text."""
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
        written.set_parse_math(False)  # a price in dollars is no formula
    for across, down, colour in bars:
        ends_at = [1 - place / height for place in down]
        figure.add_artist(Line2D([place / WIDTH for place in across], ends_at, color=colour, linewidth=2))
    return figure
