"""What is the perplexity? Compared with a plain implementation of the published protocol, and with full logits."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from component.error import UserError
from component.evaluate.perplexity import longlora_windows, measure_perplexity, sliding_windows
from tests.conftest import ROOT
from tests.reference.longlora_perplexity import longlora_perplexity


@pytest.fixture
def tokens(tiny_llama_config):
    return np.random.default_rng(0).integers(0, tiny_llama_config.vocab_size, 211).astype(np.uint16)


def full_logits_losses(model, ids: torch.Tensor) -> torch.Tensor:
    """(B, T - 1), from the full logits of a window."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")


class TestLongloraProtocol:
    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize(("seq_len", "stride"), [(32, 32), (32, 8), (20, 13), (16, 40)])
    def test_equals_the_published_one(self, seq_len, stride, batch_size, tiny_llama, tokens):
        ours = measure_perplexity(tiny_llama, tokens, seq_len=seq_len, stride=stride, batch_size=batch_size)
        expected = longlora_perplexity(tiny_llama, tokens, seq_len, stride)
        assert abs(expected - tiny_llama.config.vocab_size) > 10, "the logits are not uniform"
        assert ours.perplexity == pytest.approx(expected, rel=1e-4)
        assert (ours.protocol, ours.seq_len, ours.stride) == ("longlora", seq_len, stride)
        assert ours.windows == len(range(0, len(tokens) - seq_len, stride)) - 1
        assert ours.tokens_scored == ours.windows * (seq_len - 1)
        assert ours.loss == pytest.approx(math.log(ours.perplexity))

    @pytest.mark.parametrize(
        ("length", "spans"),
        [
            (16, None),  # no window
            (17, None),  # the only window is the last one, which is left out
            (32, None),
            (33, [(0, 16)]),
            (48, [(0, 16)]),
            (49, [(0, 16), (16, 32)]),
        ],
    )
    def test_short_files(self, length, spans, tiny_llama, tokens):
        """Files of seq_len, seq_len + 1, 2 seq_len, 2 seq_len + 1 ... tokens, at stride = seq_len = 16."""
        if spans is None:
            with pytest.raises(UserError, match=f"{length} tokens hold no window .* or use --protocol sliding"):
                measure_perplexity(tiny_llama, tokens[:length], seq_len=16, stride=16)
            return
        ours = measure_perplexity(tiny_llama, tokens[:length], seq_len=16, stride=16)
        assert [(window.start, window.end) for window in longlora_windows(length, 16, 16)] == spans
        losses = [full_logits_losses(tiny_llama, ids_of(tokens[start:end])).mean() for start, end in spans]
        assert ours.loss == pytest.approx(float(sum(losses)) / len(losses), rel=1e-5)
        assert ours.tokens_scored == 15 * len(spans)

    def test_the_message_names_the_shortest_possible_file(self, tiny_llama, tokens):
        with pytest.raises(UserError, match="needs 25"):
            measure_perplexity(tiny_llama, tokens[:24], seq_len=16, stride=8)
        assert measure_perplexity(tiny_llama, tokens[:25], seq_len=16, stride=8).windows == 1

    @pytest.mark.parametrize(("seq_len", "stride"), [(96, 96), (96, 40)])
    @pytest.mark.parametrize("folder", ["script/demo/base", None], ids=["the demo's base", "random weights"])
    def test_equals_the_published_one_on_text(self, folder, seq_len, stride, base_folder):
        """A trained model and a random one, each on the text of this file in its own tokens."""
        folder = ROOT / folder if folder else base_folder
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
        tokens = np.array(tokenizer(Path(__file__).read_text(encoding="utf-8")[:2500]).input_ids, dtype=np.uint16)
        ours = measure_perplexity(model, tokens, seq_len=seq_len, stride=stride)
        assert ours.windows > 5
        assert ours.perplexity == pytest.approx(longlora_perplexity(model, tokens, seq_len, stride), rel=1e-4)


def ids_of(tokens) -> torch.Tensor:
    return torch.from_numpy(np.asarray(tokens).astype(np.int64))[None]


class TestSlidingProtocol:
    @pytest.mark.parametrize("stride", [1, 7, 16, 31, 32, 33, 500])
    @pytest.mark.parametrize("length", [2, 31, 32, 33, 34, 63, 64, 65, 211])
    def test_each_token_but_the_first_is_scored_once(self, length, stride):
        windows = sliding_windows(length, 32, stride)
        scored = [token for window in windows for token in range(window.first_scored, window.end)]
        assert scored == list(range(1, length))
        for window in windows:
            assert 0 <= window.start < window.first_scored < window.end <= length
            assert window.end - window.start == min(32, length), "as much left context as the window allows"

    def test_a_short_file_is_one_pass(self, tiny_llama, tokens):
        ours = measure_perplexity(tiny_llama, tokens[:40], seq_len=64, stride=64, protocol="sliding")
        losses = full_logits_losses(tiny_llama, ids_of(tokens[:40]))
        assert (ours.windows, ours.tokens_scored) == (1, 39)
        assert ours.loss == pytest.approx(float(losses.mean()), rel=1e-5)

    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("stride", [5, 16, 32])
    def test_each_token_sees_its_own_window(self, stride, batch_size, tiny_llama, tokens):
        """Against one forward pass per token, over the window that scores it."""
        ours = measure_perplexity(
            tiny_llama, tokens[:70], seq_len=32, stride=stride, protocol="sliding", batch_size=batch_size
        )
        total = 0.0
        for window in sliding_windows(70, 32, stride):
            losses = full_logits_losses(tiny_llama, ids_of(tokens[window.start : window.end]))[0]
            total += float(losses[window.first_scored - window.start - 1 :].sum())
        assert ours.tokens_scored == 69
        assert ours.loss == pytest.approx(total / 69, rel=1e-5)

    def test_stride_1_is_every_token_with_a_full_window(self, tiny_llama, tokens):
        ours = measure_perplexity(tiny_llama, tokens[:24], seq_len=8, stride=1, protocol="sliding")
        losses = []
        for place in range(1, 24):
            window = tokens[max(0, place - 7) : place + 1]
            losses.append(float(full_logits_losses(tiny_llama, ids_of(window))[0, -1]))
        assert ours.loss == pytest.approx(sum(losses) / 23, rel=1e-5)

    def test_all_tokens_weigh_the_same(self, tiny_llama, tokens):
        """33 tokens: one window scores 31, the next one a single token."""
        ours = measure_perplexity(tiny_llama, tokens[:33], seq_len=32, stride=32, protocol="sliding")
        first = full_logits_losses(tiny_llama, ids_of(tokens[:32]))[0]
        last = full_logits_losses(tiny_llama, ids_of(tokens[1:33]))[0, -1]
        assert ours.windows == 2
        assert ours.loss == pytest.approx(float((first.sum() + last) / 32), rel=1e-5)


def test_a_file_of_one_token_is_not_cured_by_the_protocol_it_has(tiny_llama, tokens):
    with pytest.raises(UserError, match=r"1 tokens hold no window .* needs 2; name a longer file$"):
        measure_perplexity(tiny_llama, tokens[:1], seq_len=16, stride=16, protocol="sliding")


@pytest.mark.parametrize(
    ("length", "longlora", "sliding"),
    [(16, None, (1, 15)), (17, None, (2, 16)), (33, (1, 15), (3, 32))],
    ids=["seq_len", "seq_len + 1", "2 seq_len + 1"],
)
def test_files_of_about_a_windows_length(length, longlora, sliding, tiny_llama, tokens):
    """(windows, tokens scored), as in the table of script/evaluate/README.md."""
    for protocol, expected in (("longlora", longlora), ("sliding", sliding)):
        if expected is None:
            with pytest.raises(UserError, match="hold no window"):
                measure_perplexity(tiny_llama, tokens[:length], seq_len=16, stride=16, protocol=protocol)
            continue
        ours = measure_perplexity(tiny_llama, tokens[:length], seq_len=16, stride=16, protocol=protocol)
        assert (ours.windows, ours.tokens_scored) == expected


def slow_losses(model, tokens, windows) -> list[tuple[int, int, float]]:
    """(position in the window, index in the file, loss) of each scored token, from full logits."""
    scored = []
    for window in windows:
        losses = full_logits_losses(model, ids_of(tokens[window.start : window.end]))[0]
        for index in range(window.first_scored, window.end):
            position = index - window.start
            scored.append((position, index, float(losses[position - 1])))
    return scored


class TestAggregates:
    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize(("protocol", "seq_len", "stride"), [("longlora", 20, 13), ("sliding", 32, 7)])
    @pytest.mark.parametrize("buckets", [1, 4, 6])
    def test_by_position(self, protocol, seq_len, stride, buckets, batch_size, tiny_llama, tokens):
        ours = measure_perplexity(
            tiny_llama, tokens, seq_len=seq_len, stride=stride, protocol=protocol, batch_size=batch_size,
            position_buckets=buckets,
        )  # fmt: skip
        windows = (longlora_windows if protocol == "longlora" else sliding_windows)(len(tokens), seq_len, stride)
        scored = slow_losses(tiny_llama, tokens, windows)
        assert [bucket.start for bucket in ours.by_position] == [0, *(b.end for b in ours.by_position[:-1])]
        assert ours.by_position[-1].end == seq_len
        assert sum(bucket.tokens for bucket in ours.by_position) == ours.tokens_scored == len(scored)
        for bucket in ours.by_position:
            losses = [loss for position, _, loss in scored if bucket.start <= position < bucket.end]
            assert bucket.tokens == len(losses)
            assert bucket.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
            assert bucket.perplexity == pytest.approx(math.exp(bucket.loss))

    def test_edges_of_buckets(self, tiny_llama, tokens):
        ours = measure_perplexity(tiny_llama, tokens, seq_len=20, stride=20, position_buckets=3)
        assert [(b.start, b.end, b.tokens) for b in ours.by_position] == [(0, 7, 54), (7, 14, 63), (14, 20, 54)]

    @pytest.mark.parametrize(("buckets", "expected"), [(0, 0), (8, 8), (100, 16)])
    def test_no_more_buckets_than_positions(self, buckets, expected, tiny_llama, tokens):
        ours = measure_perplexity(tiny_llama, tokens, seq_len=16, stride=16, position_buckets=buckets)
        assert len(ours.by_position) == expected

    def test_positions_beyond_a_short_file(self, tiny_llama, tokens):
        ours = measure_perplexity(
            tiny_llama, tokens[:9], seq_len=16, stride=16, protocol="sliding", position_buckets=4
        )
        assert [bucket.tokens for bucket in ours.by_position] == [3, 4, 1, 0]
        assert math.isnan(ours.by_position[3].loss)

    @pytest.mark.parametrize(("protocol", "stride"), [("longlora", 16), ("longlora", 9), ("sliding", 9)])
    def test_by_document(self, protocol, stride, tiny_llama, tokens):
        """Windows with several documents, documents in several windows, and an empty document."""
        starts = [0, 5, 6, 60, 60, 101, 208]
        ours = measure_perplexity(
            tiny_llama, tokens, seq_len=16, stride=stride, protocol=protocol, document_starts=starts
        )
        windows = (longlora_windows if protocol == "longlora" else sliding_windows)(len(tokens), 16, stride)
        scored = slow_losses(tiny_llama, tokens, windows)
        assert {document.document for document in ours.by_document} >= {0, 1, 2, 4, 5}
        assert 3 not in [document.document for document in ours.by_document]
        assert sum(document.tokens for document in ours.by_document) == len(scored)
        for document in ours.by_document:
            end = [*starts, len(tokens)][document.document + 1]
            losses = [loss for _, index, loss in scored if starts[document.document] <= index < end]
            assert (document.start, document.tokens) == (starts[document.document], len(losses))
            assert document.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    def test_without_document_starts(self, tiny_llama, tokens):
        assert measure_perplexity(tiny_llama, tokens, seq_len=16, stride=16).by_document == []


def test_time_and_memory(tiny_llama, tokens):
    ours = measure_perplexity(tiny_llama, tokens, seq_len=32, stride=8, protocol="sliding")
    assert ours.seconds > 0
    assert ours.tokens_per_second * ours.seconds == pytest.approx(32 * ours.windows)
    assert ours.processes == 1
    assert (ours.peak_allocated_gib is None) == (not torch.cuda.is_available())


@pytest.mark.parametrize("protocol", ["longlora", "sliding"])
def test_uniform_logits_give_the_vocabulary_size(protocol, tiny_llama, tokens):
    tiny_llama.lm_head.weight.data.zero_()
    ours = measure_perplexity(tiny_llama, tokens, seq_len=32, stride=16, protocol=protocol)
    assert ours.perplexity == pytest.approx(tiny_llama.config.vocab_size, rel=1e-5)


@pytest.mark.parametrize("protocol", ["longlora", "sliding"])
def test_infinite_perplexity(protocol, tiny_llama, tokens):
    tiny_llama.lm_head.weight.data.mul_(1e6)
    assert measure_perplexity(tiny_llama, tokens, seq_len=32, stride=32, protocol=protocol).perplexity == math.inf


def test_the_model_is_not_changed(tiny_llama, tokens):
    """No gradients, and the same mode as before."""
    measure_perplexity(tiny_llama, tokens, seq_len=32, stride=32)
    assert not tiny_llama.training
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())


@pytest.mark.parametrize(
    "wrong", [{"protocol": "rolling"}, {"seq_len": 1}, {"stride": 0}, {"batch_size": 0}, {"position_buckets": -1}]
)
def test_invalid_values_are_refused(wrong, tiny_llama, tokens):
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        measure_perplexity(tiny_llama, tokens, **{"seq_len": 32, "stride": 32, **wrong})
