"""The demo's data is written where there is none."""

import pytest

from tests.outcome import refused_by_us


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.bin", "prompt.txt"])
def test_k7_files_of_others(name, run_program, tmp_path):
    (tmp_path / name).write_text("mine")
    refused_by_us(run_program("script/demo/data.py", "--output", tmp_path), f"--output: {tmp_path / name} exists")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
