"""The experiments' rows: settings that train.py takes, and the programs beside it that some of them compare with."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from component.error import UserError
from component.train.argument import parse_arguments
from script.experiment import measure
from script.experiment.rows import RECIPE, all_rows, main_rows
from script.experiment.train_rolled import rolled_shift_short
from tests.reference.shift_short import LOOP, ROLLED, shift_short_rolled


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


REFERENCE = {"shift_short": LOOP, "rolled": ROLLED}


def logits_by(folder, ids, attention_name):
    config = AutoConfig.from_pretrained(folder)
    config.group_size = 8
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation=attention_name)
    with torch.no_grad():
        return model.train(attention_name != "sdpa")(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", ["shift_short", "rolled"])
def test_a_model_can_be_evaluated_under_the_attention_that_it_was_trained_with(name, base_folder):
    ids = torch.randint(3, 100, (2, 24))
    full = logits_by(base_folder, ids, "sdpa")
    with measure.evaluating_with(name, 8):
        under = logits_by(base_folder, ids, "sdpa")
    assert_close(under, logits_by(base_folder, ids, REFERENCE[name]), atol=1e-5, rtol=1e-5)
    assert (under - full).abs().max() > 1e-3
    assert torch.equal(logits_by(base_folder, ids, "sdpa"), full)


def test_several_evaluations_in_one_process(base_folder, tmp_path, run_program):
    tokens = tmp_path / "text.bin"
    np.random.default_rng(0).integers(3, 100, 200).astype(np.uint16).tofile(tokens)
    tasks = []
    for attention in (None, "rolled", None):
        output = str(tmp_path / f"{len(tasks)}.json")
        words = [
            "--base_model",
            str(base_folder),
            "--data_path",
            str(tokens),
            "--seq_len",
            "24",
            "--output_json",
            output,
        ]
        tasks.append({"words": words, "attention": attention, "group_size": 8 if attention else None})
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    run_program("script/experiment/measure.py", str(tmp_path / "tasks.json"))
    losses = [json.loads((tmp_path / f"{n}.json").read_text())["results"][0]["loss"] for n in range(3)]
    assert losses[0] == losses[2] != losses[1]


def test_windows_of_no_whole_number_of_groups_are_refused(base_folder):
    with measure.evaluating_with("rolled", 8), pytest.raises(UserError, match="whole number"):
        logits_by(base_folder, torch.randint(3, 100, (1, 20)), "sdpa")
