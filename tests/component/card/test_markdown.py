"""Text of others stays text: checked with a Markdown parser where it could become something else."""

import pytest

from component.card.markdown import file_name, quoted, table

NASTY = [
    "a\n---\nlicense: mit\n---",
    "`code`, **bold**",
    "| cells | of | a | table |",
    "<script>alert(1)</script>",
    "<!-- comment -->",
    "\u202ereversed\u202c",
    "\x1b[31mred",
    "back\\slash\\`",
    "``",
]


@pytest.mark.parametrize("text", NASTY)
def test_quoted_text_is_one_code_span(text):
    found = quoted(text)
    inner = found[1:-1]
    assert (found[0], found[-1]) == ("`", "`")
    assert inner.isprintable()
    assert not set("`|<>\\\n\r") & set(inner)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("NousResearch/Llama-2-7b-hf", "`NousResearch/Llama-2-7b-hf`"),
        ("東京 Größe", "`東京 Größe`"),
        ("two\nlines", "`two lines`"),
        ("a`b|c", "`a?b?c`"),
        ("", "`?`"),
        (None, "`None`"),
        ("x" * 201, f"`{'x' * 199}…`"),
    ],
)
def test_quoted(value, expected):
    assert quoted(value) == expected


@pytest.mark.parametrize(
    "path", ["/home/me/books.jsonl", "books.jsonl", "C:\\data\\books.jsonl", "owner/set/books.jsonl"]
)
def test_of_a_path_only_the_name(path):
    assert file_name(path) == "`books.jsonl`"
    assert file_name("/data/books/") == "`books`"


def test_table():
    assert table(["a", "b"], [[1, "x"], [2, "y"]]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"
