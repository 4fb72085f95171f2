"""Which sources are mixed, in which shares? The YAML of build_sft.py: its keys and their validation."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from component.corpus.mapping import PRESETS, template_problem
from component.data.source import resolve_files
from component.error import UserError, first_line, nearest

TURNS = ("first", "all")
FILTERS = ("min_tokens", "max_tokens", "contains", "excludes")


@dataclass
class MixtureSource:
    name: str
    path: str
    mapping: Any  # a preset's name, or {input, output} templates
    share: float | None = None  # relative to other sources' shares
    count: int | None = None  # maximum of examples; with neither count nor share: all
    turns: str = "first"  # of a conversation: the first, or all as {"messages": ...}
    filters: dict = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


@dataclass
class Mixture:
    sources: list[MixtureSource]
    total: int | None = None  # maximum of examples of all sources together


SOURCE_KEYS = ("name", "path", "mapping", "share", "count", "turns", "filters")
TOP_KEYS = ("sources", "total")


def read_mixture(file: Path) -> Mixture:
    """
    Raises:
        UserError: everything that is wrong with the YAML, in one message.
    """
    values, sources = read_sources(file, TOP_KEYS, SOURCE_KEYS, _source)
    return Mixture(sources, values.get("total"))


def read_sources(
    file: Path,
    top_keys: Iterable[str],
    source_keys: Iterable[str],
    read: Callable[[object, str], tuple[Any, list[str]]],
    problems_of: Callable[[dict], list[str]] = lambda values: [],
) -> tuple[dict, list]:
    """The values of a YAML with `sources` and `total`, and its sources.

    Args:
        read: a source from its entry and its place in messages, and what is wrong with it.
        problems_of: what is wrong with other values.

    Raises:
        UserError: everything that is wrong with the YAML, in one message.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config: {file} can't be read: {first_line(error)}") from error
    if not isinstance(values, dict) or not isinstance(values.get("sources"), list) or not values["sources"]:
        raise UserError(f"--config: {file} needs `sources:`, a list of {', '.join(source_keys)}")
    problems = unknown_keys(values, top_keys, "")
    if "total" in values and not is_count(values["total"]):
        problems.append(f"total: {values['total']!r}; use a whole number of at least 1")
    if "total" in values and not any(isinstance(entry, dict) and entry.get("share") for entry in values["sources"]):
        problems.append("total: no source has a share that it could limit; give sources shares instead of counts")
    problems += problems_of(values)
    sources = []
    for at, entry in enumerate(values["sources"]):
        source, found = read(entry, f"sources[{at}]")
        problems += found
        sources += [source] if source else []
    names = [source.name for source in sources]
    problems += [
        f"name: {name!r} is used twice; give each source its own"
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    if problems:
        raise UserError(f"{file}:\n  " + "\n  ".join(problems))
    return values, sources


def _source(entry: object, place: str) -> tuple[MixtureSource | None, list[str]]:
    if not isinstance(entry, dict):
        return None, [f"{place}: {entry!r} is not a mapping with keys ({', '.join(SOURCE_KEYS)})"]
    place, problems = name_problems(entry, place, SOURCE_KEYS, ("name", "path", "mapping"))
    more = (*share_problems(entry), *_mapping_problems(entry.get("mapping")), *_filter_problems(entry.get("filters")))
    problems += [f"{place}: {problem}" for problem in more]
    if entry.get("turns", "first") not in TURNS:
        problems.append(f"{place}: turns: {entry['turns']!r} is not one of {', '.join(TURNS)}")
    files, missing = files_of(entry, place)
    problems += missing
    if problems:
        return None, problems
    values = {key: value for key, value in entry.items() if value is not None}
    return MixtureSource(**values, files=files), []


def name_problems(entry: dict, place: str, keys: Iterable[str], required: Iterable[str]) -> tuple[str, list[str]]:
    """How messages call a source, and what is wrong with its keys, its name and its path."""
    name = entry.get("name")
    place = f"{place} ({name})" if name else place
    problems = unknown_keys(entry, keys, f"{place}: ")
    problems += [f"{place}: {key} is missing" for key in required if not entry.get(key)]
    problems += [
        f"{place}: {key}: {entry[key]!r} is not a string"
        for key in ("name", "path")
        if entry.get(key) and not isinstance(entry[key], str)
    ]
    return place, problems


def files_of(entry: dict, place: str) -> tuple[list[Path], list[str]]:
    """The files of a source's path, and what is wrong with it."""
    if isinstance(entry.get("path"), str) and entry["path"]:
        try:
            return resolve_files(entry["path"], f"{place}: path"), []
        except UserError as error:
            return [], [str(error)]
    return [], []


def share_problems(entry: dict) -> list[str]:
    share, count = entry.get("share"), entry.get("count")
    problems = []
    if share is not None and count is not None:
        problems.append("share and count exclude each other; remove one")
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if share is not None and not (is_number and 0 < share < math.inf):
        problems.append(f"share: {share!r}; use a number above 0")
    if count is not None and not is_count(count):
        problems.append(f"count: {count!r}; use a whole number of at least 1")
    return problems


def _mapping_problems(mapping: object) -> list[str]:
    if not mapping:
        return []  # reported as missing
    if isinstance(mapping, str):
        known = ", ".join(PRESETS)
        return (
            [] if mapping in PRESETS else [f"mapping: {mapping!r} is not a preset{nearest(mapping, PRESETS)}: {known}"]
        )
    if not isinstance(mapping, dict):
        return [f"mapping: {mapping!r}; use a preset ({', '.join(PRESETS)}) or input and output templates"]
    problems = unknown_keys(mapping, ("input", "output"), "mapping: ")
    for key in ("input", "output"):
        problem = template_problem(mapping[key]) if key in mapping else "is missing"
        problems += [f"mapping: {key}: {problem}"] if problem else []
    return problems


def _filter_problems(filters: object) -> list[str]:
    if filters is None:
        return []
    if not isinstance(filters, dict):
        return [f"filters: {filters!r}; use {', '.join(FILTERS)}"]
    problems = unknown_keys(filters, FILTERS, "filters: ")
    for key in ("min_tokens", "max_tokens"):
        if key in filters and not is_count(filters[key]):
            problems.append(f"filters: {key}: {filters[key]!r}; use a whole number of at least 1")
    if not problems and filters.get("min_tokens", 0) > filters.get("max_tokens", math.inf):
        problems.append(f"filters: min_tokens {filters['min_tokens']} is above max_tokens {filters['max_tokens']}")
    for key in ("contains", "excludes"):
        try:
            re.compile(filters.get(key, ""))
        except (re.error, TypeError) as error:
            problems.append(f"filters: {key}: {filters[key]!r} is not a regular expression ({error})")
    return problems


def unknown_keys(values: dict, known: Iterable[str], place: str) -> list[str]:
    known = tuple(known)
    return [
        f"{place}unknown key {key!r}{nearest(str(key), known)}; known: {', '.join(known)}"
        for key in values
        if key not in known
    ]


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class Shared(Protocol):
    """A source that is taken by its share or its count."""

    @property
    def name(self) -> str: ...
    @property
    def share(self) -> float | None: ...
    @property
    def count(self) -> int | None: ...


def apportion(sources: Sequence[Shared], total: int | None, available: list[int]) -> list[int]:
    """How many of its available examples each source contributes.

    Counts come first. Shares are exact: as many of each as the scarcest source and `total` allow.
    """
    taken = [
        min(source.count, has) if source.count else 0 if source.share else has
        for source, has in zip(sources, available, strict=True)
    ]
    shares = [source.share or 0.0 for source in sources]
    if not any(shares):
        return taken
    unit = min(has / share for share, has in zip(shares, available, strict=True) if share)
    if total:
        unit = min(unit, max(0, total - sum(taken)) / sum(shares))
    # rounding of 3 / 0.3 * 0.3 must not lose an example, nor of billions of tokens
    return [count or int(unit * share * (1 + 1e-12) + 1e-9) for count, share in zip(taken, shares, strict=True)]


def lost_shares(sources: Sequence[Shared], counts: Iterable[dict[str, Any]]) -> list[str]:
    """Which sources have a share of which nothing is left, so that the mixture would not be the one asked for.

    Args:
        counts: of each source, "available" and "sampled".
    """
    pairs = [(source, found) for source, found in zip(sources, counts, strict=True) if source.share]
    empty = [source.name for source, found in pairs if not found["available"]]
    if empty:  # what the others lose is its fault
        return [f"{name}: nothing in it fits, and the scarcest source decides what others get" for name in empty]
    return [
        f"{source.name}: share {source.share:g} comes to less than the first that was drawn of its "
        f"{found['available']:,}"
        for source, found in pairs
        if not found["sampled"]
    ]
