"""Continuations of passages: which flags are rejected."""

import pytest

from tests.script.experiment.downstream.mistakes import refuses


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--shown", "17"], ["--shown", "17", "16"]),
        (["--long_tokens", "9", "3"], ["--long_tokens", "9, 3"]),
        (["--long_tokens", "9", "3000"], ["--long_tokens", "3000", "64 tokens"]),
    ],
)
def test_mistakes(words, parts, run_program, base_folder, tmp_path):
    refuses(run_program, "examples", words, parts, base_folder, tmp_path)
