"""What the programs that build data read and write: no input is overwritten, and the names beside a corpus."""

import argparse
import json
from pathlib import Path

import pytest

from component.corpus.flags import add_common_flags
from component.corpus.length import describe_lengths
from component.corpus.output import claimed_output, statistics_paths, write_statistics
from component.error import UserError


def parsed(output: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_common_flags(parser)
    return parser.parse_args(["--tokenizer", "words", "--output", str(output), *words])


def test_the_folder_of_an_output_is_made(tmp_path):
    with claimed_output(parsed(tmp_path / "new" / "out.jsonl"), [], [tmp_path / "in.jsonl"]):
        pass
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize("output", ["x/../in.json", "in", "in.jsonl"])
def test_a_source_is_never_written(tmp_path, output):
    """K7: neither as the output nor as what stands beside it: `--source in.json --output in` destroyed in.json."""
    (tmp_path / "in.json").write_text("")
    (tmp_path / "in.stats.json").write_text("")
    (tmp_path / "x").mkdir()
    flags = parsed(tmp_path / output, "--overwrite")
    beside = [Path(f"{flags.output}.json"), *statistics_paths(flags.output)]
    with (
        pytest.raises(UserError, match=r"--output: .*in\.(stats\.)?json would be overwritten, but --source reads it"),
        claimed_output(flags, beside, [tmp_path / "in.json", tmp_path / "in.stats.json"]),
    ):
        pass


def test_the_tokenizer_and_the_configuration_are_never_written(tmp_path):
    (tmp_path / "tokenizer.json").write_text("")
    flags = parsed(tmp_path / "tokenizer.json", "--overwrite", "--tokenizer", str(tmp_path))
    with pytest.raises(UserError, match="but --tokenizer reads it"), claimed_output(flags, [], []):
        pass
    flags = parsed(tmp_path / "tokenizer.json", "--overwrite")
    flags.config = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="but --config reads it"), claimed_output(flags, [], []):
        pass


def test_an_existing_output_needs_a_word(tmp_path):
    (tmp_path / "out.jsonl").write_text("")
    with (
        pytest.raises(UserError, match=r"--output: .*out\.jsonl exists; .* --overwrite"),
        claimed_output(parsed(tmp_path / "out.jsonl"), [], []),
    ):
        pass
    with claimed_output(parsed(tmp_path / "out.jsonl", "--overwrite"), [], []):
        pass


@pytest.mark.parametrize(("name", "side"), [("b.c.jsonl", "b.c"), ("b", "b")])
def test_what_stands_beside_a_corpus(tmp_path, name, side):
    stats = {"lengths": describe_lengths([3, 5])}
    told = write_statistics(tmp_path / name, stats, {"": stats["lengths"]}, "texts")
    assert told == f"{name}: 2 texts, 8 tokens -> {tmp_path / name}"
    assert {file.name for file in tmp_path.iterdir()} == {f"{side}.stats.json", f"{side}.png"}
    assert json.loads((tmp_path / f"{side}.stats.json").read_text()) == stats
