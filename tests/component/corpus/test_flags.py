"""Which flags the programs that build data share, and what is refused together."""

import argparse
from pathlib import Path

import pytest

from component.corpus.flags import add_common_flags, check_common_flags
from component.error import UserError


def parsed(output: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_common_flags(parser)
    return parser.parse_args(["--tokenizer", "words", "--output", str(output), *words])


def test_defaults_are_right(tmp_path):
    flags = parsed(tmp_path / "out.jsonl")
    assert (flags.tokenizer, flags.output, flags.max_bad_fraction, flags.overwrite) == (
        "words",
        tmp_path / "out.jsonl",
        0.01,
        False,
    )
    assert flags.num_proc >= 1
    check_common_flags(flags)


def test_everything_wrong_is_told_at_once(tmp_path):
    flags = parsed(tmp_path, "--num_proc", "0", "--max_bad_fraction", "1.5")
    flags.most, flags.few, flags.none = 0, 1, None
    with pytest.raises(UserError) as error:
        check_common_flags(flags, "most", "few", "none", problems=["--more: wrong"])
    assert str(error.value).split("\n  ") == [
        "--num_proc: 0; use at least 1",
        "--most: 0; use at least 1",
        "--max_bad_fraction: 1.5; use 0 (none) to 1",
        f"--output: {tmp_path} is a folder; name a file",
        "--more: wrong",
    ]
    with pytest.raises(UserError, match=r"^--max_bad_fraction: -0\.1; use 0 \(none\) to 1$"):
        check_common_flags(parsed(tmp_path / "a", "--max_bad_fraction", "-0.1"))
