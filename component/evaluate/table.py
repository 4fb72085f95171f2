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
    has_keys = any(result.key_tokens is not None for result in results)
    rows = []
    for r in results:
        counts = [str(r.seq_len), str(r.stride), str(r.windows), f"{r.tokens_scored:,}"]
        rows.append([*counts, f"{r.loss:.4f}", f"{r.perplexity:.4f}", f"{r.tokens_per_second:,.0f}"])
        if has_keys:
            rows[-1] += [_or_dash(r.long_ppl), f"{r.key_tokens or 0:,}", f"{100 * (r.key_token_share or 0):.2f} %"]
    return grid([*head, "LongPPL", "key tokens", "share"] if has_keys else head, rows)


def _or_dash(perplexity: float | None) -> str:
    return "-" if perplexity is None else f"{perplexity:.4f}"


def no_key_tokens(results: list[Perplexity], first: int) -> str:
    """Why lengths have no LongPPL; empty if all have one.

    Args:
        first: the first position in a window that can be key.
    """
    lengths = [result.seq_len for result in results if result.key_tokens == 0]
    return "\n".join(
        f"no LongPPL at seq_len {length}: "
        + (f"the first {first} tokens of a window can't be key" if length <= first else "no token is key")
        for length in lengths
    )


def comparison(results: dict[str, list[Perplexity]]) -> str:
    """Several models: a row each, a column per length; a second table of LongPPL, if it was measured."""
    first = next(iter(results.values()))
    lengths = [str(result.seq_len) for result in first]
    rows = [[name, *(f"{result.perplexity:.4f}" for result in row)] for name, row in results.items()]
    tables = [grid(["perplexity at a window of", *lengths], rows)]
    if any(result.key_tokens is not None for result in first):
        rows = [[name, *(_or_dash(result.long_ppl) for result in row)] for name, row in results.items()]
        tables.append(grid(["LongPPL at a window of", *lengths], rows))
    return "\n\n".join(tables)


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
