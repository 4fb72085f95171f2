"""script/performance/long_run.py: refusals."""

from tests.outcome import refused_by_us


def test_runs_too_short_to_compare_are_refused(run_program, tmp_path):
    words = ("--work", tmp_path / "work", "--output_json", tmp_path / "result.json")
    outcome = run_program("script/performance/long_run.py", *words, "--steps", 39)
    refused_by_us(outcome, "--steps: 39; use at least 40")
    assert not (tmp_path / "work").exists()
