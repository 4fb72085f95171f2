"""Pretraining of the small bases: token stream, schedule, optimizer groups, loss, tokenizer."""

import pytest
import torch

from script.shared.pretraining import build_optimizer, learning_rate_scale, mean_loss, token_stream, train_tokenizer
from tests.conftest import TEXTS
from tests.words import word_tokenizer


def test_every_text_in_the_stream_has_bos_and_eos():
    stream = token_stream(word_tokenizer(), ["a", "b c", "d"], seed=0)
    assert stream.tolist() == [0, 4, 5, 1, 0, 6, 1, 0, 3, 1]  # shuffled, reproducibly
    assert stream.dtype == torch.long


@pytest.mark.parametrize(
    ("step", "progress", "scale"),
    [
        (0, 0.0, 0.01),
        (49, 0.0, 0.5),
        (99, 0.0, 1.0),
        (500, 0.5, 0.5),
        (500, 1.0, 0.0),
        (500, 1.5, 0.0),
        (49, 0.5, 0.25),
    ],
)
def test_warm_up_times_cosine(step, progress, scale):
    assert learning_rate_scale(step, progress) == pytest.approx(scale, abs=1e-12)


def test_norms_have_no_weight_decay(tiny_llama):
    decaying, others = build_optimizer(tiny_llama, 1e-3).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(others["params"]) == 2 * 2 + 1
    assert {weight.dim() for weight in others["params"]} == {1}
    assert len(decaying["params"]) + len(others["params"]) == len(list(tiny_llama.parameters()))


def test_windows_are_equally_weighted(tiny_llama):
    stream = torch.randint(384, (70,))
    losses = [tiny_llama(ids, labels=ids).loss.item() for ids in stream[:60].view(3, 1, 20)]
    assert mean_loss(tiny_llama, stream, 20) == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_the_tokenizer_is_byte_level():
    tokenizer = train_tokenizer(TEXTS, 300, 64)
    assert (len(tokenizer), tokenizer.model_max_length, tokenizer.pad_token) == (300, 64, None)
    ids = tokenizer("東京 naïve").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "東京 naïve"
