"""Several evaluations in one process, also under the attention that a model was trained with."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from component.error import UserError
from script.experiment import measure
from tests.reference.shift_short import LOOP, ROLLED

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
        words = ["--base_model", str(base_folder), "--data_path", str(tokens)]
        words += ["--seq_len", "24", "--output_json", output]
        tasks.append({"words": words, "attention": attention, "group_size": 8 if attention else None})
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    run_program("script/experiment/measure.py", str(tmp_path / "tasks.json"))
    losses = [json.loads((tmp_path / f"{n}.json").read_text())["results"][0]["loss"] for n in range(3)]
    assert losses[0] == losses[2] != losses[1]


def test_windows_that_are_not_multiples_of_the_group_size_are_refused(base_folder):
    with (
        measure.evaluating_with("rolled", 8),
        pytest.raises(UserError, match="20 tokens; use unpadded multiples of 8"),
    ):
        logits_by(base_folder, torch.randint(3, 100, (1, 20)), "sdpa")
