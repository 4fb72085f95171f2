"""How does text of others stand in a model card without acting as Markdown, HTML or YAML?"""

import re
from collections.abc import Iterable
from typing import Any

LONGEST = 200  # characters of a quoted text


def quoted(value: Any) -> str:
    """`value` in backticks, on one line.

    What could end the backticks, a table's cell or an HTML comment becomes a question mark: letters of any script,
    digits, spaces and the usual punctuation of names remain.
    """
    text = " ".join(str(value).split())
    text = "".join(c if c.isprintable() and c not in "`|<>\\" else "?" for c in text)
    return f"`{text if len(text) <= LONGEST else text[: LONGEST - 1] + '…'}`" if text else "`?`"


def file_name(path: Any) -> str:
    """The last part of a path, quoted: folders above it are nobody's business."""
    return quoted(re.split(r"[/\\]", str(path).rstrip("/\\"))[-1])


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; cells are taken as they are."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
