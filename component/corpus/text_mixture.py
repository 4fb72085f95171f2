"""Which texts are mixed into a pretraining corpus, in which shares? The YAML of build_pretrain.py, and its sample.

A source has its own range of lengths, so the same files may be two sources: long books, and short pieces of them.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from component.corpus.flags import LONG_TEXTS
from component.corpus.mixture import apportion, files_of, is_count, name_problems, read_sources, share_problems
from component.corpus.pretrain import Choice, TextMeasure, texts_of
from component.corpus.sampling import first_of_each, sample_key
from component.corpus.scan import Chunk, Scan, ScannedChunk
from component.corpus.shuffle import write_shuffled

UNITS = ("tokens", "texts")
TOP_KEYS = ("sources", "total", "unit")
SOURCE_KEYS = ("name", "path", "share", "count", "min_tokens", "max_tokens", "long_texts", "text_key")
KEY_BITS = 64  # of a text's key that decide: with equal ones, both texts are in or both are out


@dataclass
class TextSource:
    name: str
    path: str
    share: float | None = None  # relative to other sources' shares, of tokens or texts
    count: int | None = None  # maximum of tokens or texts; with neither count nor share: all
    min_tokens: int = 4096
    max_tokens: int = 32768
    long_texts: str = "drop"
    text_key: str = "text"
    files: list[Path] = field(default_factory=list)


@dataclass
class TextMixture:
    sources: list[TextSource]
    total: int | None = None  # maximum of tokens or texts of all sources together
    unit: str = "tokens"  # what shares, counts and the total are numbers of


def read_text_mixture(file: Path) -> TextMixture:
    """
    Raises:
        UserError: everything that is wrong with the YAML, in one message.
    """

    def problems_of(values: dict) -> list[str]:
        unit = values.get("unit", "tokens")
        return [] if unit in UNITS else [f"unit: {unit!r} is not one of {', '.join(UNITS)}"]

    values, sources = read_sources(file, TOP_KEYS, SOURCE_KEYS, _source, problems_of)
    return TextMixture(sources, values.get("total"), values.get("unit", "tokens"))


def _source(entry: object, place: str) -> tuple[TextSource | None, list[str]]:
    if not isinstance(entry, dict):
        return None, [f"{place}: {entry!r} is not a mapping with keys ({', '.join(SOURCE_KEYS)})"]
    place, problems = name_problems(entry, place, SOURCE_KEYS, ("name", "path"))
    problems += [f"{place}: {problem}" for problem in (*share_problems(entry), *_length_problems(entry))]
    files, missing = files_of(entry, place)
    problems += missing
    if problems:
        return None, problems
    values = {key: value for key, value in entry.items() if value is not None}
    return TextSource(**values, files=files), []


def _length_problems(entry: dict) -> list[str]:
    given = {name: entry.get(name) for name in ("min_tokens", "max_tokens")}
    bounds = {name: getattr(TextSource, name) if bound is None else bound for name, bound in given.items()}
    problems = [
        f"{name}: {bound!r}; use a whole number of at least 1" for name, bound in bounds.items() if not is_count(bound)
    ]
    if not problems and bounds["min_tokens"] > bounds["max_tokens"]:
        problems.append(f"min_tokens {bounds['min_tokens']} is above max_tokens {bounds['max_tokens']}")
    if entry.get("long_texts", "drop") not in LONG_TEXTS:
        problems.append(f"long_texts: {entry['long_texts']!r} is not one of {', '.join(LONG_TEXTS)}")
    if not isinstance(entry.get("text_key", "text"), str):
        problems.append(f"text_key: {entry['text_key']!r} is not a string")
    return problems


class MixedTextMeasure:
    """Measures chunks of records by the rules of their source."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mixture: TextMixture):
        self.measures = [
            TextMeasure(tokenizer, source.min_tokens, source.max_tokens, source.long_texts, source.text_key)
            for source in mixture.sources
        ]

    def __call__(self, group: int, chunk: Chunk) -> ScannedChunk:
        return self.measures[group](group, chunk)


def sample_mixture(scan: Scan, mixture: TextMixture, seed: int) -> tuple[list[Choice], list[dict[str, Any]]]:
    """The sample in input order, and what was available and taken of each source, in texts and tokens.

    Of each source the texts with the lowest keys, up to its quota: the last one is left out if it would exceed it.
    Memory holds 12 bytes per text.
    """
    kept = sum(count.kept for count in scan.counts)
    is_first = first_of_each((row[-1] for _, row in scan.rows()), kept)  # duplicates count for the first source
    groups = np.fromiter((scan.files[file].group for file, _ in scan.rows()), dtype=np.int32, count=kept)
    tokens = np.fromiter((row[3] for _, row in scan.rows()), dtype=np.int64, count=kept)
    keys = np.fromiter((sample_key(row[-1], seed) >> KEY_BITS for _, row in scan.rows()), np.uint64, count=kept)
    amounts = tokens if mixture.unit == "tokens" else np.ones(kept, dtype=np.int64)
    own = [np.flatnonzero(is_first & (groups == group)) for group in range(len(mixture.sources))]
    quotas = apportion(mixture.sources, mixture.total, [int(amounts[rows].sum()) for rows in own])
    is_taken, summary = np.zeros(kept, dtype=bool), []
    for rows, quota in zip(own, quotas, strict=True):
        ordered = rows[np.argsort(keys[rows], kind="stable")]
        taken = ordered[np.cumsum(amounts[ordered]) <= quota]
        is_taken[taken] = True
        found = {"available": rows, "sampled": taken}
        summary.append(
            {name: len(part) for name, part in found.items()}
            | {f"{name}_tokens": int(tokens[part].sum()) for name, part in found.items()}
        )
    chosen = [Choice(file, *row) for (file, row), taken in zip(scan.rows(), is_taken, strict=True) if taken]
    return sorted(chosen, key=lambda choice: (choice.file, choice.number, choice.start)), summary


def write_mixture(file: Path, scan: Scan, mixture: TextMixture, choices: list[Choice], seed: int) -> None:
    """Write one {"text": ...} per line, shuffled: training may read it as a stream.

    Raises:
        UserError: a file changed after it was scanned.
    """
    keys = [source.text_key for source in mixture.sources]

    def lines() -> Iterable[tuple[int, str]]:
        for choice, text in zip(choices, texts_of(scan, choices, keys), strict=True):
            yield sample_key(choice.hashed, seed, "order"), json.dumps({"text": text}, ensure_ascii=False) + "\n"

    write_shuffled(file, lines(), len(choices))
