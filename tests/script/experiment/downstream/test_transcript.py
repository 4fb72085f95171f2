"""Transcripts drawn as pictures: all text is inside, and nothing overlaps."""

import random

from matplotlib.backends.backend_agg import FigureCanvasAgg

from component.storage.result import save_figure
from script.experiment.downstream.transcript import DPI, MARGIN, WIDTH, Block, Measure, draw


def test_all_text_is_inside_the_picture_and_nothing_overlaps(tmp_path):
    draw_words = random.Random(3)
    text = " ".join("".join(draw_words.choices("abcdefgh$_^{}\\ i", k=9)) for _ in range(150))
    unbroken = "W" * 400
    blocks = [
        Block("Before", text, "red", "a note"),
        Block("After", unbroken, "blue"),
        Block("True", "$5 & $6", "green"),
    ]
    figure = draw("A title " * 30, [[blocks[0]], blocks[:2], [], [blocks[2]]], "A caption. " * 60)
    file = tmp_path / "picture.png"
    save_figure(figure, file)
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    renderer, width = FigureCanvasAgg(figure).get_renderer(), WIDTH * DPI
    boxes = [(written.get_text(), written.get_window_extent(renderer)) for written in figure.texts]
    assert len(boxes) > 20
    for line, box in boxes:
        assert 0 < box.x0 < box.x1 <= width - 0.9 * MARGIN * DPI, line
        assert 0 < box.y0 < box.y1 < figure.get_figheight() * figure.dpi, line
    for number, (line, box) in enumerate(boxes):
        for other, beside in boxes[number + 1 :]:
            overlap = min(box.x1, beside.x1) - max(box.x0, beside.x0), min(box.y1, beside.y1) - max(box.y0, beside.y0)
            assert min(overlap) <= 0.5, (line, other)
    written = "".join(line for line, _ in boxes).replace(" ", "")
    assert written.count("W") == 400
    assert written.count(text.replace(" ", "")[:40]) == 2, "alone, and beside the other"


def test_text_is_wrapped_at_spaces():
    measure = Measure()
    lines = measure.wrap("one two\n three  four", measure.width("one two three"))
    assert lines == ["one two three", "four"]
    assert measure.wrap("", 1.0) == [""]
