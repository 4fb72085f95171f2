"""Which tokens are key? Compared with a forward pass per token; literal losses at the thresholds."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from component.distributed.sequence import join_sequence_group
from component.evaluate.long_ppl import (
    KeyTokenFinder,
    KeyTokenRule,
    find_key_tokens,
    is_key,
    key_mask,
    known_key_tokens,
)
from component.evaluate.perplexity import measure_perplexity, plan_windows
from component.evaluate.split import attend_across_processes
from component.loss import next_token_losses
from component.model import load_base, load_config
from tests.processes import run_in_processes
from tests.reference.long_ppl import key_tokens, log_likelihoods

RULE = KeyTokenRule(context=8, stride=5, alpha=0.15, beta=-7.0)


@pytest.fixture
def tokens(tiny_llama_config):
    return np.random.default_rng(0).integers(0, tiny_llama_config.vocab_size, 211).astype(np.uint16)


def found_in(model, rows: np.ndarray, rule: KeyTokenRule) -> list[list[int]]:
    ids = torch.from_numpy(rows.astype(np.int64))
    mask = key_mask(model, ids, next_token_losses(model, ids), rule)
    assert mask.shape == (ids.shape[0], ids.shape[1] - 1)
    return [(row.nonzero()[:, 0] + 1).tolist() for row in mask]


def test_the_published_values_are_the_defaults():
    assert KeyTokenRule() == KeyTokenRule(context=4096, stride=1024, alpha=2.0, beta=-2.0)


@pytest.mark.parametrize(
    ("full", "short", "expected"),
    [
        (1.5, 3.5, False),  # a gain of exactly alpha
        (1.5, 3.5625, True),
        (1.5, 3.4375, False),
        (2.0, 9.0, False),  # a log-likelihood of exactly beta
        (1.9375, 9.0, True),
        (2.0625, 9.0, False),
        (0.0, 2.0, False),
        (3.5, 1.0, False),  # the long context does harm
        (0.5, math.inf, True),
        (math.inf, math.inf, False),
        (math.nan, 9.0, False),
        (1.0, math.nan, False),
    ],
)
def test_both_bounds_are_strict(full, short, expected):
    """Halves and sixteenths: exact in fp32."""
    assert is_key(torch.tensor([full]), torch.tensor([short]), KeyTokenRule()).tolist() == [expected]


@pytest.mark.parametrize(("alpha", "beta", "expected"), [(0.0, -1.0, [True, False]), (0.5, -3.0, [False, True])])
def test_other_thresholds(alpha, beta, expected):
    rule = KeyTokenRule(alpha=alpha, beta=beta)
    assert is_key(torch.tensor([0.5, 2.5]), torch.tensor([1.0, 4.0]), rule).tolist() == expected


class TestAgainstTheDefinition:
    @pytest.mark.parametrize("length", [14, 18, 31, 33, 64])
    @pytest.mark.parametrize(("context", "stride"), [(8, 5), (8, 8), (5, 3), (1, 1), (3, 7)])
    def test_one_pass_per_token(self, context, stride, length, tiny_llama, tokens):
        """Windows that are, and are not, K and a multiple of the stride."""
        rule = replace(RULE, context=context, stride=stride)
        rows = np.stack([tokens[:length], tokens[100 : 100 + length]])
        expected = [key_tokens(tiny_llama, row.tolist(), context, stride, rule.alpha, rule.beta) for row in rows]
        assert found_in(tiny_llama, rows, rule) == expected
        if length >= 31:
            eligible = length - rule.first
            assert 0 < len(expected[0]) < eligible, "some are key, and some not"
            assert expected[0] != expected[1]

    @pytest.mark.parametrize("length", [2, 8, 9, 13])
    def test_windows_too_short_for_a_key_token(self, length, tiny_llama, tokens):
        """The first K + stride tokens have their whole context in the short one, whatever the thresholds."""
        rule = replace(RULE, alpha=0.0, beta=-100.0)
        assert found_in(tiny_llama, tokens[None, :length], rule) == [[]]
        assert key_tokens(tiny_llama, tokens[:length].tolist(), 8, 5, 1e-3, -100.0) == []
        windows = plan_windows(length, length, length, "sliding")
        tiny_llama.model.forward = None  # no pass is needed
        assert find_key_tokens(tiny_llama, tokens[:length], windows, rule) == [[]]

    def test_the_first_that_can_be_key(self, tiny_llama, tokens):
        rule = replace(RULE, alpha=0.0, beta=-100.0)
        of_last = log_likelihoods(tiny_llama)
        starts = [
            s for s in range(100) if of_last(tokens[s : s + 14].tolist()) > of_last(tokens[s + 5 : s + 14].tolist())
        ]
        assert 10 < len(starts) < 90
        rows = np.stack([tokens[start : start + 14] for start in range(100)])
        assert found_in(tiny_llama, rows, rule) == [[13] if start in starts else [] for start in range(100)]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("protocol", "stride"), [("longlora", 31), ("longlora", 12), ("sliding", 31), ("sliding", 9)])
def test_long_ppl(protocol, stride, batch_size, tiny_llama, tokens):
    """exp of the mean loss of all scored key tokens, of a token in two windows twice."""
    windows = plan_windows(len(tokens), 31, stride, protocol)
    finder = KeyTokenFinder(tiny_llama, windows, RULE)
    options = {"seq_len": 31, "stride": stride, "protocol": protocol, "batch_size": batch_size}
    ours = measure_perplexity(tiny_llama, tokens, **options, key_tokens=finder)
    of_last, losses, expected = log_likelihoods(tiny_llama), [], []
    for window in windows:
        ids = tokens[window.start : window.end].tolist()
        keys = key_tokens(tiny_llama, ids, RULE.context, RULE.stride, RULE.alpha, RULE.beta)
        expected.append([key for key in keys if key >= window.first_scored - window.start])
        losses += [-of_last(ids[: key + 1]) for key in expected[-1]]
    assert len(losses) > 5
    assert finder.positions() == expected == find_key_tokens(tiny_llama, tokens, windows, RULE, batch_size)
    assert ours.key_tokens == len(losses)
    assert ours.key_token_share == len(losses) / ours.tokens_scored
    assert ours.long_ppl == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert ours.long_ppl != pytest.approx(ours.perplexity, rel=0.05)
    plain = measure_perplexity(tiny_llama, tokens, **options)
    assert (plain.perplexity, plain.key_tokens, plain.long_ppl) == (ours.perplexity, None, None)
    known = measure_perplexity(tiny_llama, tokens, **options, key_tokens=known_key_tokens(expected))
    assert (known.long_ppl, known.key_tokens) == (ours.long_ppl, ours.key_tokens)


def test_a_batch_of_a_first_window_and_a_later_one(tiny_llama, tokens):
    """The first is scored from its beginning, the other one at its end alone."""
    windows, rule = plan_windows(40, 31, 9, "sliding"), replace(RULE, alpha=0.01, beta=-100.0)
    first, second = find_key_tokens(tiny_llama, tokens[:40], windows, rule, batch_size=2)
    assert first == key_tokens(tiny_llama, tokens[:31].tolist(), 8, 5, 0.01, -100.0)
    assert min(first) < 18, "in a block that the second needs not"
    assert second == [k for k in key_tokens(tiny_llama, tokens[9:40].tolist(), 8, 5, 0.01, -100.0) if k >= 22]
    assert second


def test_no_key_token_is_none_and_not_nan(tiny_llama, tokens):
    windows = plan_windows(len(tokens), 31, 31, "longlora")
    finder = KeyTokenFinder(tiny_llama, windows, replace(RULE, alpha=100.0))
    ours = measure_perplexity(tiny_llama, tokens, seq_len=31, stride=31, key_tokens=finder)
    assert (ours.long_ppl, ours.key_tokens, ours.key_token_share) == (None, 0, 0.0)
    assert math.isfinite(ours.perplexity)


@pytest.mark.parametrize(
    ("protocol", "stride", "count", "expected"),
    [
        # K = 8, stride 5: a window of 31 has blocks from 5, 10, 15, 20 on, which score 13-17, 18-22, 23-27, 28-30
        ("longlora", 31, 63, [31, 13, 13, 13, 11]),
        ("sliding", 13, 57, [31, 13, 13, 13, 11, *[31, 13, 13, 11] * 2]),  # later windows score from 18 on
        ("sliding", 14, 59, [31, 13, 13, 13, 11] * 3),  # from 17 on
    ],
)
def test_what_is_computed(protocol, stride, count, expected, tiny_llama, tokens):
    """Blocks have at most K + stride tokens of at most `batch_size` windows; none without scored tokens."""
    shapes: list[torch.Size] = []
    decoder = tiny_llama.get_decoder()
    decoder.register_forward_pre_hook(lambda *call: shapes.append(call[2]["input_ids"].shape), with_kwargs=True)
    windows = plan_windows(count, 31, stride, protocol)
    find_key_tokens(tiny_llama, tokens[:count], windows, RULE)
    assert shapes == [(1, length) for length in expected]
    shapes.clear()
    find_key_tokens(tiny_llama, tokens[:count], windows, RULE, batch_size=2)
    assert max(rows * length for rows, length in shapes) <= 2 * 31
    assert {length for _, length in shapes} == {31, 13, 11}


def find_together(folder: Path, tokens: np.ndarray) -> None:
    model = load_base(
        str(folder), load_config(str(folder)), dtype=torch.float32, load_in_4bit=False, device=torch.device("cpu")
    ).eval()
    windows = plan_windows(len(tokens), 31, 12, "sliding")
    expected = []
    for window in windows:
        ids = tokens[window.start : window.end].tolist()
        keys = key_tokens(model, ids, RULE.context, RULE.stride, RULE.alpha, RULE.beta)
        expected.append([key for key in keys if key >= window.first_scored - window.start])
    assert any(expected)
    assert find_key_tokens(model, tokens, windows, RULE, batch_size=2) == expected
    join_sequence_group(dist.get_world_size())
    attend_across_processes(model)
    assert find_key_tokens(model, tokens, windows, RULE) == expected
    join_sequence_group(1)


def test_several_processes_find_the_same(base_folder, tokens):
    """Each with its own windows, and each window by all."""
    run_in_processes(find_together, 2, base_folder, tokens)
