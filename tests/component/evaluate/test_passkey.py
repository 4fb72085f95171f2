"""Can a number be retrieved from a long text? Prompts of an exact length, and which answers are correct."""

import pytest
import torch
from transformers import AutoTokenizer

from component.error import UserError
from component.evaluate.passkey import PromptMaker, Trial, accuracy, draw_key, even_depths, is_right, run_trials
from component.inference.generate import generate_greedy
from script.evaluate.passkey_model import make_tokenizer


@pytest.fixture(params=["bytes", "single digits", "the demo's"])
def any_tokenizer(request, tokenizer):
    """One falls back to bytes, one splits digits as LLaMA2's does, one merges digits."""
    if request.param == "bytes":
        return tokenizer
    if request.param == "single digits":
        return make_tokenizer()
    return AutoTokenizer.from_pretrained("script/demo/base", model_max_length=10**9)


class TestPrompts:
    @pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
    @pytest.mark.parametrize("length", [301, 302, 303, 500, 4096])
    def test_exact_length(self, length, depth, any_tokenizer):
        prompt = PromptMaker(any_tokenizer).prompt(length, depth, "31415")
        assert len(prompt.ids) == length
        text = any_tokenizer.decode(prompt.ids)
        assert text.startswith("<s>One line of this text holds a pass key.")
        assert text.count("\nThe pass key is 31415. Remember it. 31415 is the pass key.") == 1
        assert text.count("31415") == 2
        assert text.endswith("\nWhat is the pass key? The pass key is")

    def test_position_of_the_needle(self, any_tokenizer):
        maker = PromptMaker(any_tokenizer)
        prompt = maker.prompt(700, 0.4, "27182")
        needle = any_tokenizer.decode(prompt.ids[prompt.needle_start : prompt.needle_end])
        assert needle == "\nThe pass key is 27182. Remember it. 27182 is the pass key."
        room = 700 - len(maker.start) - len(maker.question) - (prompt.needle_end - prompt.needle_start)
        assert abs(prompt.needle_start - len(maker.start) - 0.4 * room) <= max(map(len, maker.lines)) / 2

    def test_needle_is_between_complete_lines(self):
        maker = PromptMaker(make_tokenizer())
        for depth in (0.1, 0.35, 0.8):
            prompt = maker.prompt(400, depth, "16180")
            before = maker.tokenizer.decode(prompt.ids[: prompt.needle_start])
            assert before.endswith(("again.", "slow.", "low."))

    def test_a_complete_prompt(self):
        """26 + 11 + 11 + 5 + 26 + 11 tokens: the last filler line is truncated."""
        maker = PromptMaker(make_tokenizer())
        assert maker.tokenizer.decode(maker.prompt(90, 0.99, "12345").ids) == (
            "<s>One line of this text holds a pass key. Find it and keep it in mind; the last line asks for it."
            "\nThe river is wide. The boats are slow.\nThe hills are far. The clouds are low.\nWe walk there."
            "\nThe pass key is 12345. Remember it. 12345 is the pass key."
            "\nWhat is the pass key? The pass key is"
        )

    def test_first_and_last_line(self, any_tokenizer):
        maker = PromptMaker(any_tokenizer)
        first, last = (maker.prompt(600, depth, "14142") for depth in (0.0, 1.0))
        assert first.needle_start == len(maker.start)
        assert last.needle_end == 600 - len(maker.question)

    def test_the_shortest(self, any_tokenizer):
        maker = PromptMaker(any_tokenizer)
        with pytest.raises(UserError, match=r"--lengths: 9 tokens are too few; .* at least \d+$") as refused:
            maker.prompt(9, 0.5, "10000")
        shortest = int(str(refused.value).split("at least ")[1])
        prompt = maker.prompt(shortest, 0.5, "10000")
        assert len(prompt.ids) == shortest
        with pytest.raises(UserError):
            maker.prompt(shortest - 1, 0.5, "10000")

    def test_no_eos_token_inside_the_prompt(self, tokenizer):
        """Some tokenizers append one to every text."""

        class Ending:
            eos_token_id = 1

            def __call__(self, text, add_special_tokens=True):
                encoded = tokenizer(text, add_special_tokens=add_special_tokens)
                if add_special_tokens:
                    encoded["input_ids"] = [*encoded["input_ids"], 1]
                return encoded

        assert 1 not in PromptMaker(Ending()).prompt(600, 0.5, "12345").ids


@pytest.mark.parametrize(
    ("answered", "right"),
    [
        ("12345", True),
        (" 12345.", True),
        (" **12345**. Remember 99999", True),
        ("12345\nWhat", True),
        ("123456", False),
        ("1234", False),
        ("12 345", False),
        ("54321, no, 12345", False),
        (" the pass key is", False),
        ("", False),
    ],
)
def test_which_answers_are_correct(answered, right):
    assert is_right(answered, "12345") is right


def test_keys():
    assert draw_key(42, 1024, 0.5, 0) == draw_key(42, 1024, 0.5, 0)
    others = {
        draw_key(42, 1024, 0.5, 1),
        draw_key(42, 1024, 0.6, 0),
        draw_key(42, 2048, 0.5, 0),
        draw_key(1, 1024, 0.5, 0),
    }
    assert draw_key(42, 1024, 0.5, 0) not in others
    assert len(others) == 4
    assert all(len(draw_key(0, 1, 0.0, trial)) == 5 for trial in range(200))


def test_an_answer_can_show_surplus_digits(any_tokenizer):
    maker = PromptMaker(any_tokenizer)
    assert maker.answer_tokens("12345") > len(maker.tokens_of(" 123456"))


def test_depths():
    assert even_depths(1) == [0.5]
    assert even_depths(3) == [0.0, 0.5, 1.0]


def test_accuracy():
    trials = [Trial(length, depth, trial, length, 0, "", "", right) for length, depth, trial, right in [
        (64, 0.0, 0, True), (64, 0.0, 1, False), (64, 1.0, 0, True), (64, 1.0, 1, True),
        (128, 0.0, 0, False), (128, 0.0, 1, False), (128, 1.0, 0, False), (128, 1.0, 1, True),
    ]]  # fmt: skip
    assert accuracy(trials, [0.0, 1.0], [64, 128]) == [[0.5, 0.0], [1.0, 0.5]]


class TestTrials:
    def test_every_setting_once(self, tiny_llama, tokenizer):
        found = list(run_trials(tiny_llama, tokenizer, lengths=[310, 350], depths=[0.0, 1.0], trials=2, seed=7))
        assert [(t.length, t.depth, t.trial) for t in found] == [
            (310, 0.0, 0), (310, 0.0, 1), (310, 1.0, 0), (310, 1.0, 1),
            (350, 0.0, 0), (350, 0.0, 1), (350, 1.0, 0), (350, 1.0, 1),
        ]  # fmt: skip
        assert [t.prompt_tokens for t in found] == [t.length for t in found]
        assert len({t.expected for t in found}) == 8
        assert not any(t.is_right for t in found), "the weights are random"

    def test_a_length_too_short_is_refused_before_anything_runs(self, tokenizer):
        with pytest.raises(UserError, match="--lengths: 20 tokens"):
            next(run_trials(None, tokenizer, lengths=[4096, 20], depths=[0.5], trials=1, seed=0))

    def test_greedy_equals_decoding_without_a_cache(self, tiny_llama, tokenizer):
        """Compared with the top-1 token of one full forward pass per token, beyond the model's 64 positions."""
        ids = PromptMaker(tokenizer).prompt(320, 0.5, "12345").ids
        found = generate_greedy(tiny_llama, tokenizer, ids, 8)
        expected = list(ids)
        for _ in range(8):
            with torch.no_grad():
                logits = tiny_llama(input_ids=torch.tensor([expected]), use_cache=False).logits
            expected.append(int(logits[0, -1].argmax()))
            if expected[-1] == tokenizer.eos_token_id:
                break
        assert found == expected[320:]
        assert len(set(found)) > 1
