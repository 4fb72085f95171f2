"""Every run of the experiments is a valid YAML of train.py."""

import pytest
import yaml

from component.train.settings import parse_arguments
from script.experiment.rows import RECIPE, all_runs, main_runs


@pytest.mark.parametrize("name", [name for name, config in all_runs().items() if config.program])
def test_train_py_accepts_the_settings_of_every_run(name, tmp_path):
    config, file = all_runs()[name], tmp_path / "run.yaml"
    paths = {"model_name_or_path": "base", "train_file": "train.jsonl", "output_dir": str(tmp_path)}
    lengths = {"max_seq_length": config.lengths[0], "model_max_length": config.lengths[0], "use_cpu": True}
    file.write_text(yaml.safe_dump({**RECIPE, **paths, **lengths, **config.changes}))
    args, training_args = parse_arguments(["--train_args_file", str(file)])
    for key, value in config.changes.items():
        assert getattr(args, key, getattr(training_args, key, None)) == value


def test_names_are_unique():
    names = [config.name for config in main_runs()]
    assert len(names) == len(set(names)) == 17
    assert {"longqlora", "full-attention", "rolled", "full", "longlora", "16-bit"} <= set(names)
