"""What flags do the programs that build data share?"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from component.error import UserError

LONG_TEXTS = ("drop", "split")


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of the model to be trained")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.01, help="largest tolerated share of bad lines (0.01)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output, discard unfinished work")


def add_source_flags(parser: argparse.ArgumentParser, required: bool = True) -> None:
    sources = "files, folders or hub ids; see component/data/source.py"
    parser.add_argument("--source", nargs="+", required=required, help=sources)
    key = "key of the text in JSON Lines and parquet (text)"
    parser.add_argument("--text_key", default="text" if required else None, help=key)


def check_common_flags(flags: argparse.Namespace, *counts: str, problems: Iterable[str] = ()) -> None:
    """Report wrong common flags, `counts` below 1 and further `problems` in one message."""
    found = []
    for name in ("num_proc", *counts):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            found.append(f"--{name}: {getattr(flags, name)}; use at least 1")
    if not 0 <= flags.max_bad_fraction <= 1:
        found.append(f"--max_bad_fraction: {flags.max_bad_fraction}; use 0 (none) to 1")
    if flags.output.is_dir():
        found.append(f"--output: {flags.output} is a folder; name a file")
    if found := [*found, *problems]:
        raise UserError("\n  ".join(found))
