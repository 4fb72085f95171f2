"""What does KV-cache quantization cost?"""

import numpy as np
import pytest
import torch

from component.error import UserError
from component.evaluate.kv_cache import measure_cache_quantization, second_half

TOKENS = np.random.default_rng(0).integers(2, 300, 600).astype(np.uint16)


def test_decoding_equals_one_forward_pass(tiny_llama):
    ids = torch.from_numpy(TOKENS[:41].astype(np.int64))
    logits, _ = second_half(tiny_llama, ids, "dynamic")
    with torch.no_grad():
        expected = tiny_llama(ids[None]).logits[0, 19:40]  # predict tokens 20 to 40
    torch.testing.assert_close(logits, expected)


def test_figures(tiny_llama):
    exact, int8, int4 = measure_cache_quantization(tiny_llama, TOKENS, ("dynamic", "int8", "int4"), 160, windows=3)
    losses = []
    for start in (0, 160, 320):
        ids = torch.from_numpy(TOKENS[start : start + 160].astype(np.int64))
        with torch.no_grad():
            logits = tiny_llama(ids[None]).logits[0, 79:159]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[80:]).item())
    assert exact.perplexity == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-5)
    assert (exact.logit_change, exact.same_choice) == (0, 1)
    assert exact.bytes_per_window == 159 * 2 * 2 * 16 * 4, "the last token is predicted, not cached"
    assert 0 < int8.logit_change < int4.logit_change
    assert int4.same_choice <= int8.same_choice <= 1


@pytest.mark.parametrize(("tokens", "enough"), [(600, "use from 128 to 600"), (100, "use a longer file")])
def test_no_window(tokens, enough, tiny_llama):
    with pytest.raises(UserError, match=rf"--seq_len: {tokens} tokens hold no window of 601; {enough}"):
        measure_cache_quantization(tiny_llama, TOKENS[:tokens], ("dynamic",), 601, 3)


@pytest.mark.parametrize("seq_len", [0, 1, 127])
def test_windows_in_which_nothing_is_quantized_are_refused(seq_len, tiny_llama):
    with pytest.raises(UserError, match=f"--seq_len: {seq_len}; use at least 128"):
        measure_cache_quantization(tiny_llama, TOKENS, ("int4",), seq_len, 3)


def test_the_shortest_window_is_quantized(tiny_llama):
    (int4,) = measure_cache_quantization(tiny_llama, TOKENS, ("int4",), 128, 1)
    assert int4.logit_change > 0
