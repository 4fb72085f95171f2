"""Is a text that several processes share computed as by one? Losses and greedy continuations."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from component.distributed.sequence import join_sequence_group
from component.error import UserError
from component.evaluate.split import attend_across_processes, check_split, continue_greedily, losses_of
from component.inference.generate import generate_greedy
from component.loss import next_token_losses
from component.model import load_base, load_config
from component.tokenizer import load_tokenizer
from tests.processes import run_in_processes
from tests.reference.plain_path import tiny_config

CPU = torch.device("cpu")


def compare_losses(folder: Path) -> None:
    processes = dist.get_world_size()
    config = load_config(str(folder))
    for rows, tokens in ((1, 61), (2, 60), (1, processes), (1, processes + 1)):
        model = load_base(str(folder), config, dtype=torch.float32, load_in_4bit=False, device=CPU).eval()
        ids = torch.randint(3, config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        expected = next_token_losses(model, ids)
        join_sequence_group(processes)
        attend_across_processes(model)
        torch.testing.assert_close(losses_of(model, ids), expected, atol=1e-5, rtol=1e-5)
        join_sequence_group(1)


@pytest.mark.parametrize("processes", [2, 3])  # 4 heads: by heads, from the left
def test_losses(base_folder, processes):
    run_in_processes(compare_losses, processes, base_folder)


def compare_continuations(folder: Path) -> None:
    tokenizer, config = load_tokenizer(str(folder)), load_config(str(folder))
    model = load_base(str(folder), config, dtype=torch.float32, load_in_4bit=False, device=CPU).eval()
    prompt = torch.randint(3, config.vocab_size, (45,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = generate_greedy(model, tokenizer, prompt, 6)
    assert len(set(expected)) > 1
    join_sequence_group(2)
    attend_across_processes(model)
    passes = []
    model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    wrong = [*expected[:2], expected[2] + 1, *expected[3:]]
    for draft, most in ((expected, 1), ([], 6), (wrong, 4), ([*expected, 5, 6, 7], 1)):
        passes.clear()
        assert continue_greedily(model, prompt, 6, draft, set()) == expected
        assert len(passes) == most
    assert continue_greedily(model, prompt, 6, expected, {expected[2]}) == expected[: expected.index(expected[2]) + 1]
    join_sequence_group(1)


def test_continuations_do_not_depend_on_the_draft(base_folder):
    run_in_processes(compare_continuations, 2, base_folder)


def test_what_cannot_be_split_is_refused():
    config = tiny_config()
    check_split(config, 1, 1)
    check_split(config, 64, 2)
    with pytest.raises(UserError, match="--sequence_parallel_size: 4 processes for 3 tokens"):
        check_split(config, 3, 4)
    window = tiny_config("mistral", s2=False, sliding_window=32)
    check_split(window, 32, 2)
    with pytest.raises(UserError, match=r"mistral's own attention .* over 33 tokens"):
        check_split(window, 33, 2)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UserError, match="dynamic positions depend on the length"):
        check_split(config, 128, 2)
