"""Lines in the order of their keys."""

import pytest

from component.corpus.shuffle import write_shuffled


def test_lines_are_in_the_order_of_their_keys(tmp_path):
    keys = [(at * 37) % 101 for at in range(101)]
    lines = [(key, f"{'é' * key}{key}\n") for key in keys]
    write_shuffled(tmp_path / "out", iter(lines), len(lines))
    assert (tmp_path / "out").read_text(encoding="utf-8") == "".join(line for _, line in sorted(lines))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_of_a_failure(tmp_path):
    def lines():
        yield 1, "a\n"
        raise ValueError("changed")

    with pytest.raises(ValueError, match="changed"):
        write_shuffled(tmp_path / "out", lines(), 2)
    assert not list(tmp_path.iterdir())
