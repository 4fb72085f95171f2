"""Passkey retrieval after tuning: which flags are rejected. Its samples: test_passkey_samples.py."""

import pytest

from tests.script.experiment.downstream.mistakes import refuses


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--steps", "0"], ["--steps", "0", "at least 1"]),
        (["--base", "/no/such"], ["--base", "/no/such"]),
        (["--lengths", "20"], ["--lengths", "20", "at least"]),
        (["--adapter", "a", "--context", "64"], ["--context", "64"]),
        (["--figure", "/proc/no/such/f.png"], ["--figure", "/proc/no/such/f.png", "be written"]),
    ],
)
def test_mistakes(words, parts, run_program, base_folder, tmp_path):
    refuses(run_program, "passkey", words, parts, base_folder, tmp_path)
