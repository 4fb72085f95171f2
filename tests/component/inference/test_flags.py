"""The flags of inference, chat and web: defaults, and values that are refused."""

import pytest

from component.error import UserError
from component.inference.flags import chat_parser, check_sampling, generation_parser
from tests.generation_flags import flags


def test_defaults():
    given = generation_parser("").parse_args([])
    check_sampling(given)
    assert (given.max_new_tokens, given.temperature, given.top_p, given.top_k) == (500, 0.35, 0.9, 0)
    assert (given.do_sample, given.repetition_penalty, given.seed, given.stop) == (True, 1.0, 42, None)
    assert (given.template, given.system) == (None, None)  # programs without a chat need no case of their own


def test_a_chat_has_a_template_and_a_system_prompt():
    given = chat_parser("").parse_args(["--template", "tokenizer", "--system", "Be brief."])
    assert (given.template, given.system) == ("tokenizer", "Be brief.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens: 0; use a number from 1 to"),
        (["--temperature", "0"], "--temperature: 0.0; use a number from 0.01 to 100, or --do_sample false"),
        (["--top_p", "1.1"], "--top_p: 1.1; use a number from 0.01 to 1"),
        (["--top_k", "-1"], "--top_k: -1; use 0"),
        (["--repetition_penalty", "0"], "--repetition_penalty: 0.0; use a number from 0.1 to 10; 1 is"),
        (["--seed", "-1"], "--seed: -1; use 0 or more"),
        (["--temperature", "1e-45"], "--temperature: 1e-45; use a number from"),  # logits / 1e-45 are infinite
        (["--temperature", "inf"], "--temperature: inf; use a number from"),
        (["--repetition_penalty", "1e-300"], "--repetition_penalty: 1e-300; use a number from"),
        (["--repetition_penalty", "inf"], "--repetition_penalty: inf; use a number from"),
        (["--temperature", "nan"], "--temperature: nan; use"),
    ],
)
def test_values_out_of_bounds(words, message):
    with pytest.raises(UserError, match=message):
        check_sampling(flags(*words))
