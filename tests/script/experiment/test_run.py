"""Runs are trained in a folder of their own, or not at all."""

import pytest

from tests.outcome import refused_by_us


@pytest.mark.parametrize(("folder", "more"), [("runs", []), ("cost-runs", ["--cost"])])
def test_k7_a_work_folder_of_others(folder, more, run_program, base_folder, tmp_path):
    (tmp_path / "work" / folder / "longqlora-4096-0").mkdir(parents=True)
    words = ["--data", tmp_path, "--work", tmp_path / "work", "--rows", "base", *more]
    outcome = run_program("script/experiment/run.py", "--base", base_folder, *words)
    refused_by_us(outcome, f"--work: {tmp_path / 'work' / folder} holds files that run.py did not write")
    base = tmp_path / "work" / folder / "longqlora-4096-0"
    outcome = run_program("script/experiment/run.py", "--base", base, *words)
    refused_by_us(outcome, f"holds {base}, which --base reads")
