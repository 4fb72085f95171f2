"""passkey_model.py: a model that is trained to retrieve passkeys."""

import json

MODEL = "script/evaluate/passkey_model.py"


def test_a_model_trained_for_one_step(run_program, tmp_path):
    outcome = run_program(
        MODEL, "--output", tmp_path / "model", "--length", 96, "--steps", 1, "--tokens_per_step", 128
    )
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "model" / "passkey_model.json").read_text())["curve"][0]["step"] == 0
    again = run_program(MODEL, "--output", tmp_path / "model")
    assert again.status == 1
    assert "exists" in again.err
