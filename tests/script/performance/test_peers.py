"""The original's attention, as in the baseline `original`."""

import torch

from script.performance.peers import rolled_s2
from tests.outcome import refused_by_us


def test_k7_files_of_others(run_program, base_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("mine")
    words = ["script/performance/peers.py", "hf", "--model", base_folder, "--data", data, "--length", 8]
    refused_by_us(run_program(*words, "--output_json", data), "would be overwritten, but --data reads it")
    config = base_folder / "config.json"
    refused_by_us(run_program(*words, "--output_json", config), "would be overwritten, but --model reads it")
    (tmp_path / "one.json").write_text("mine")
    refused_by_us(run_program(*words, "--output_json", tmp_path / "one.json"), "one.json exists; name another file")
    assert data.read_text() == (tmp_path / "one.json").read_text() == "mine"


def test_the_original_rolls():
    """Compared with a loop over the published definition: half of the heads rolled, groups of a quarter."""
    query, key, value = torch.randn(3, 1, 4, 16, 8)
    found, _ = rolled_s2(None, query, key, value, None, scaling=8**-0.5)
    for head in range(4):
        order = torch.arange(16).roll(-2 if head >= 2 else 0)
        for group in order.split(4):
            for place, token in enumerate(group):
                seen = group[: place + 1]
                weights = (query[0, head, token] @ key[0, head, seen].T * 8**-0.5).softmax(-1)
                torch.testing.assert_close(found[0, token, head], weights @ value[0, head, seen])


def test_the_original_repeats_keys_and_values_of_grouped_heads():
    query, key, value = torch.randn(1, 6, 16, 8), *torch.randn(2, 1, 2, 16, 8)
    found, _ = rolled_s2(None, query, key, value, None, scaling=8**-0.5)
    own = [0, 0, 0, 1, 1, 1]  # the key/value head of each query head
    expected, _ = rolled_s2(None, query, key[:, own], value[:, own], None, scaling=8**-0.5)
    assert torch.equal(found, expected)
