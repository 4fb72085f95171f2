"""Continuations of passages: which flags are rejected."""

import argparse
import json
import shutil

import pytest
import torch

from component.rope import context_length
from script.experiment.downstream.examples import extended_config, stretched
from tests.script.experiment.downstream.mistakes import refuses


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--shown", "17"], ["--shown", "17", "16"]),
        (["--long_tokens", "9", "3"], ["--long_tokens", "9, 3"]),
        (["--long_tokens", "9", "3000"], ["--long_tokens", "3000", "64 tokens"]),
    ],
)
def test_mistakes(words, parts, run_program, base_folder, tmp_path):
    refuses(run_program, "examples", words, parts, base_folder, tmp_path)


def test_the_context_of_a_raised_base_frequency_is_the_recorded_one(base_folder, tmp_path):
    """Its config says nothing but the frequency; the untrained base reads as much as LongQLoRA does."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(base_folder / "config.json", folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "adapter_config.json").write_text("{}")
    record = {"files": {}, "base_model": str(base_folder), "rope_type": "theta", "rope_factor": 3.0, "rope_theta": 5e5}
    (folder / "longqlora.json").write_text(json.dumps(record | {"context_tokens": 192}))
    flags = argparse.Namespace(base=base_folder, extended=folder)
    assert context_length(extended_config(flags)) == 192
    model = stretched(flags)
    assert context_length(model.config) == 192
    frequencies = model.get_decoder().rotary_emb.inv_freq.cpu()
    dimensions = torch.arange(0, 2 * len(frequencies), 2) / (2 * len(frequencies))
    torch.testing.assert_close(frequencies, 5e5**-dimensions)
