"""How are perplexities printed? As plain tables: a row per length, per model, or per position bucket."""

from statistics import median

from component.evaluate.aggregate import Document
from component.evaluate.perplexity import Perplexity


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A table with its first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in [head, *rows]
    )


def length_table(results: list[Perplexity]) -> str:
    """One model: a row per length."""
    head = ["seq_len", "stride", "windows", "tokens scored", "loss", "perplexity", "tokens/s"]
    rows = []
    for r in results:
        counts = [str(r.seq_len), str(r.stride), str(r.windows), f"{r.tokens_scored:,}"]
        rows.append([*counts, f"{r.loss:.4f}", f"{r.perplexity:.4f}", f"{r.tokens_per_second:,.0f}"])
    return grid(head, rows)


def comparison(results: dict[str, list[Perplexity]]) -> str:
    """Several models: a row each, a column per length."""
    lengths = [str(result.seq_len) for result in next(iter(results.values()))]
    rows = [[name, *(f"{result.perplexity:.4f}" for result in row)] for name, row in results.items()]
    return grid(["perplexity at a window of", *lengths], rows)


def position_table(results: dict[str, list[Perplexity]]) -> str:
    """The longest windows: a row per bucket of positions, a column per model."""
    longest = {name: max(row, key=lambda result: result.seq_len) for name, row in results.items()}
    first = next(iter(longest.values()))
    rows = [
        [f"{bucket.start}-{bucket.end - 1}", *(f"{r.by_position[place].perplexity:.4f}" for r in longest.values())]
        for place, bucket in enumerate(first.by_position)
        if bucket.tokens
    ]
    return grid([f"at positions of windows of {first.seq_len}", *longest], rows)


def document_line(name: str, documents: list[Document]) -> str:
    """The lowest, median and highest perplexity of a document."""
    best, worst = (pick(documents, key=lambda document: document.perplexity) for pick in (min, max))
    middle = median(document.perplexity for document in documents)
    return (
        f"{name} by document: {len(documents)} documents, from {best.perplexity:.4f} (document {best.document}) over "
        f"{middle:.4f} (median) to {worst.perplexity:.4f} (document {worst.document})"
    )
