"""The experiments' rows: settings that train.py takes."""

import pytest
import yaml

from component.train.argument import parse_arguments
from script.experiment.rows import RECIPE, all_rows, main_rows


@pytest.mark.parametrize("name", [name for name, row in all_rows().items() if row.program])
def test_every_row_is_a_yaml_that_can_be_trained_with(name, tmp_path):
    row, file = all_rows()[name], tmp_path / "row.yaml"
    paths = {"model_name_or_path": "base", "train_file": "train.jsonl", "output_dir": str(tmp_path)}
    lengths = {"max_seq_length": row.lengths[0], "model_max_length": row.lengths[0], "use_cpu": True}
    file.write_text(yaml.safe_dump({**RECIPE, **paths, **lengths, **row.changes}))
    args, training_args = parse_arguments(["--train_args_file", str(file)])
    for key, value in row.changes.items():
        assert getattr(args, key, getattr(training_args, key, None)) == value


def test_names_are_given_once():
    names = [row.name for row in main_rows()]
    assert len(names) == len(set(names)) == 17
    assert {"longqlora", "full-attention", "rolled", "full", "longlora", "16-bit"} <= set(names)
