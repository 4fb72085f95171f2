"""What do the programs that build data read and write, besides the corpus itself?"""

import argparse
import contextlib
import platform
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from component.corpus.length import draw_lengths
from component.corpus.scan import Measure, Scan, SourceFile, scan_files
from component.data.source import resolve_files
from component.error import UserError
from component.storage.claim import claimed
from component.storage.result import command, library_versions, write_json
from component.tokenizer import UNLIMITED, describe_tokenizer, load_tokenizer

LIBRARIES = ("transformers", "tokenizers", "pyarrow", "zstandard", "numpy", "matplotlib")


def resolve_sources(flags: argparse.Namespace) -> list[Path]:
    """The files of --source, each once."""
    return list(dict.fromkeys(path for source in flags.source for path in resolve_files(source, "--source")))


def open_tokenizer(flags: argparse.Namespace) -> PreTrainedTokenizerBase:
    cure = "name the folder or the hub id of the model to be trained"
    return load_tokenizer(flags.tokenizer, UNLIMITED, "--tokenizer", cure)


def journal_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.journal")


def statistics_paths(output: Path) -> tuple[Path, Path]:
    """FILE.stats.json and FILE.png beside FILE.jsonl."""
    name = output.name.removesuffix(output.suffix)
    return output.with_name(f"{name}.stats.json"), output.with_name(f"{name}.png")


def claimed_output(
    flags: argparse.Namespace, beside: Sequence[Path], sources: Iterable[Path], journal: Path | None = None
) -> contextlib.AbstractContextManager[None]:
    """Holds --output and the files `beside` it for this program; see `component.storage.claim.claimed`."""
    tokenizer = Path(flags.tokenizer)
    read = {"--source": sources, "--tokenizer": [tokenizer if tokenizer.exists() else None]}
    if config := getattr(flags, "config", None):
        read["--config"] = [config]
    written = {"--output": [flags.output, *beside, journal]}
    # an interrupted run may have written them all but the output
    resumed = [journal, *beside] if journal and journal.exists() else []
    return claimed(written, read, overwrite=flags.overwrite, resumed=resumed)


def measure_files(
    flags: argparse.Namespace, files: list[SourceFile], settings: dict, measure: Measure
) -> tuple[Scan, str]:
    """`scan_files` with a journal beside the output, and one line about bad records."""
    scan = scan_files(
        journal_path(flags.output), files, settings, measure, num_proc=flags.num_proc, overwrite=flags.overwrite
    )
    try:
        return scan, scan.tally().refuse_if_too_many(flags.max_bad_fraction)
    except UserError:
        scan.journal.unlink()  # repairing the records changes the files, whose journal would then be another run's
        raise


def write_statistics(output: Path, stats: dict, drawn: dict[str, dict], kind: str) -> str:
    """Write FILE.stats.json and FILE.png beside FILE.jsonl; returns one line about the corpus.

    Args:
        kind: of its texts, in the plural, for titles.
    """
    lengths = stats["lengths"]
    statistics, picture = statistics_paths(output)
    title = f"{output.name}: {lengths['texts']:,} {kind}, {lengths['tokens']:,} tokens"
    write_json(statistics, stats)
    draw_lengths(drawn, picture, f"{title}, median {lengths['median']:,.0f}")
    return f"{title} -> {output}"


def versions() -> dict[str, str]:
    """Versions of everything that affects a corpus and its figures."""
    return {"python": platform.python_version()} | library_versions(LIBRARIES)


def origin(flags: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Tokenizer, flags, command, versions and date, for the statistics."""
    return {
        "tokenizer": describe_tokenizer(tokenizer, flags.tokenizer),
        "flags": {name: str(value) if isinstance(value, Path) else value for name, value in vars(flags).items()},
        "command": command(),
        "versions": versions(),
        "date": str(date.today()),
    }
