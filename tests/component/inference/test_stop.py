"""Where does an answer end? Expectations by hand, over every way to cut a text into pieces."""

import itertools

import pytest

from component.error import UserError
from component.inference.flags import check_sampling
from component.inference.generate import generate, stream_generation
from component.inference.kv_cache import PromptCache
from component.inference.stop import StopWriter, before_stop, has_stop, held_back
from tests.generation_flags import GREEDY, flags
from tests.reference.greedy import stock

CASES = [
    ("one STOP two", ["STOP"], "one "),
    ("one STO", ["STOP"], None),
    ("STOP", ["STOP"], ""),
    ("a\nb", ["\n"], "a"),
    ("aab", ["ab"], "a"),
    ("ababac", ["abac"], "ab"),
    ("abc", ["abc", "b"], "a"),  # b is complete first
    ("xab", ["b", "ab"], "x"),  # complete at the same place: the longer one
    ("two one", ["one", "two"], ""),
    ("«ß»", ["ß"], "«"),
    ("", ["a"], None),
]


@pytest.mark.parametrize(("text", "stops", "expected"), CASES)
def test_by_hand(text, stops, expected):
    assert before_stop(text, stops) == expected


@pytest.mark.parametrize(("text", "stops", "expected"), CASES)
def test_streamed_in_any_pieces(text, stops, expected):
    """No part of a stop string is written, wherever the pieces begin."""
    for cuts in itertools.product([False, True], repeat=max(len(text) - 1, 0)):
        places = [0, *(at + 1 for at, cut in enumerate(cuts) if cut), len(text)]
        written: list[str] = []
        writer = StopWriter(written.append, stops)
        for start, end in itertools.pairwise(places):
            writer.put(text[start:end])
            whole = text if expected is None else expected
            assert whole.startswith("".join(written))
        writer.put("", is_last=True)
        assert "".join(written) == whole


@pytest.mark.parametrize(
    ("text", "stops", "expected"), [("a ST", ["STOP"], 2), ("a", ["STOP"], 0), ("SSS", ["SSX", "S?"], 2), ("a", [], 0)]
)
def test_held_back(text, stops, expected):
    assert held_back(text, stops) == expected


def test_tokens_that_complete_a_stop_string(tokenizer):
    ids = tokenizer("Half of the heads ß", add_special_tokens=False).input_ids
    places = [at for at in range(1, len(ids) + 1) if has_stop(tokenizer, ids[:at], ["of the h"])]
    assert places[0] == next(at for at in range(len(ids)) if "of the h" in tokenizer.decode(ids[:at]))
    assert has_stop(tokenizer, ids, ["ß"]), "of two tokens"
    assert not has_stop(tokenizer, ids, [])


class TestAnswers:
    @pytest.fixture
    def prompt_ids(self, tokenizer):
        return tokenizer("Half of the heads attend").input_ids

    @pytest.fixture
    def whole(self, tiny_llama, tokenizer, prompt_ids):
        return tokenizer.decode(stock(tiny_llama, prompt_ids, max_new_tokens=30), skip_special_tokens=True)

    @pytest.mark.parametrize("size", [1, 2, 5])
    def test_every_place(self, size, whole, tiny_llama, tokenizer, prompt_ids, capsys):
        """A stop string at every place of the answer, so at every place in its tokens."""
        assert len(whole) > 20
        for start in range(0, len(whole) - size, 3):
            stop = whole[start : start + size]
            if "\ufffd" in stop:
                continue
            words = flags(*GREEDY, "--max_new_tokens", "30", f"--stop={stop}")
            text = stream_generation(tiny_llama, tokenizer, prompt_ids, words)
            assert text == whole[: whole.find(stop)]
            assert capsys.readouterr().out == text + "\n"

    def test_generation_ends_there(self, whole, tiny_llama, tokenizer, prompt_ids):
        cache = PromptCache(tiny_llama.config)
        words = flags(*GREEDY, "--max_new_tokens", "30", f"--stop={whole[4:7]}")
        assert generate(tiny_llama, tokenizer, prompt_ids, words, str, cache=cache) == whole[:4]
        assert cache._cache.get_seq_length() < len(prompt_ids) + 20

    def test_a_special_token_as_stop_string(self, tiny_llama, tokenizer, prompt_ids):
        third = stock(tiny_llama, prompt_ids, max_new_tokens=3)[2]
        name = tokenizer.convert_ids_to_tokens(third)
        tokenizer.add_special_tokens({"additional_special_tokens": [name]})
        words = flags(*GREEDY, "--max_new_tokens", "30", f"--stop={name}")
        text = generate(tiny_llama, tokenizer, prompt_ids, words, str)
        assert text == tokenizer.decode(stock(tiny_llama, prompt_ids, max_new_tokens=2), skip_special_tokens=True)

    def test_an_empty_string_is_refused(self):
        with pytest.raises(UserError, match=r"--stop: \['a', ''\]; use strings of at least one character"):
            check_sampling(flags("--stop", "a", ""))
