"""The downstream experiments write over nothing that they read, or that somebody else wrote."""

import pytest

from tests.script.experiment.downstream.mistakes import refuses

RESULTS = {
    "passkey": ("output_json", "figure"),
    "instructions": ("output_json",),
    "examples": ("output_json", "long_figure", "short_figure"),
}
EACH = [(program, flag) for program, flags in RESULTS.items() for flag in flags]


@pytest.mark.parametrize(("program", "flag"), EACH)
def test_k7_results_of_others(program, flag, run_program, base_folder, tmp_path):
    (tmp_path / "old").write_text("mine")
    parts = [f"--{flag}: {tmp_path / 'old'} exists; name another file, or replace it with --overwrite"]
    refuses(run_program, program, [f"--{flag}", str(tmp_path / "old")], parts, base_folder, tmp_path)
    assert (tmp_path / "old").read_text() == "mine"


@pytest.mark.parametrize(("program", "flag"), EACH)
def test_k7_results_over_an_input(program, flag, run_program, base_folder, tmp_path):
    config = base_folder / "config.json"
    before, words = config.read_bytes(), [f"--{flag}", str(config), "--overwrite"]
    parts = [f"--{flag}: {config} would be overwritten, but --base reads it"]
    refuses(run_program, program, words, parts, base_folder, tmp_path)
    assert config.read_bytes() == before


@pytest.mark.parametrize("program", RESULTS)
def test_k7_a_work_folder_of_others(program, run_program, base_folder, tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    (others / "base.jsonl").write_text("mine")
    for work, part in ((base_folder, "which --base reads"), (others, f"that {program}.py did not write")):
        refuses(run_program, program, ["--work", str(work)], [f"--work: {work} holds", part], base_folder, tmp_path)
