"""Full fine-tuning writes a plain model, but not over its base."""

import pytest
import yaml

from tests.outcome import refused_by_us

BASIC = {"sft": False, "max_seq_length": 64, "model_max_length": 64, "max_steps": 1, "report_to": "none"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_k7_its_base_and_models_of_others(overwrite, run_program, base_folder, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "The dog."}\n' * 10)
    paths = {"model_name_or_path": str(base_folder), "train_file": str(tmp_path / "texts.jsonl")}
    settings = BASIC | paths | {"overwrite_output_dir": overwrite, "use_cpu": True, "optim": "adamw_torch"}
    before = (base_folder / "model.safetensors").read_bytes()

    def train(output_dir):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | {"output_dir": str(output_dir)}))
        return run_program("script/experiment/train_full.py", "--train_args_file", tmp_path / "run.yaml")

    refused_by_us(train(base_folder), "output_dir: ", "would be overwritten, but model_name_or_path reads it")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("mine")
    if not overwrite:
        refused_by_us(train(tmp_path / "other"), "output_dir: ", "config.json exists")
        assert (tmp_path / "other" / "config.json").read_text() == "mine"
    assert (base_folder / "model.safetensors").read_bytes() == before
