"""The experiments' rows: settings that train.py takes, and the programs beside it that some of them compare with."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.testing import assert_close

from component.argument import parse_arguments
from script.experiment.rows import RECIPE, all_rows, main_rows
from script.experiment.train_rolled import rolled_shift_short
from tests.reference.shift_short import shift_short_rolled


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
    assert len(names) == len(set(names)) == 14
    assert {"longqlora", "full-attention", "rolled", "full", "longlora", "16-bit"} <= set(names)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_the_rolled_row_trains_with_the_originals_roll(heads, kv_heads):
    module = SimpleNamespace(training=True, config=SimpleNamespace(group_size=8))
    shapes = ((2, heads, 24, 16), (2, kv_heads, 24, 16), (2, kv_heads, 24, 16))
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    found, _ = rolled_shift_short(module, query, key, value, None, scaling=0.25)
    expected = shift_short_rolled(query, key, value, 8, 0.25)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(found)
    for ours, theirs in zip(
        *(torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (found, expected)), strict=True
    ):
        assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
