"""How is a chat prompt spelt? Letter by letter as in the original project's component/dataset.py and chat.py."""

from pathlib import Path

import pytest

from component.template import encode_chat

ORIGINAL = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.\nUSER: {input}\nASSISTANT: "
)


def test_an_open_prompt_is_the_originals(tokenizer):
    ids, labels = encode_chat(tokenizer, [("How long is a book?", None)])
    text = ORIGINAL.format(input="How long is a book?")
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer(text, add_special_tokens=False).input_ids, "in one piece, without <s>"
    assert labels == [-100] * len(ids)


def test_a_training_sample_is_the_originals(tokenizer):
    """component/dataset.py there: prompt and answer are tokenised apart, and the end-of-sequence token follows."""
    ids, labels = encode_chat(tokenizer, [("How long?", "Long enough.")])
    prompt = tokenizer(ORIGINAL.format(input="How long?"), add_special_tokens=False).input_ids
    answer = [*tokenizer("Long enough.", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert ids == prompt + answer
    assert labels == [-100] * len(prompt) + answer


def test_white_space_around_texts_is_no_part_of_them(tokenizer):
    assert encode_chat(tokenizer, [("\n How? ", " So.\n")]) == encode_chat(tokenizer, [("How?", "So.")])


def test_several_turns(tokenizer):
    ids, labels = encode_chat(tokenizer, [("One?", "First."), ("Two?", "Second."), ("Three?", None)])
    opening = ORIGINAL.format(input="One?")
    assert tokenizer.decode(ids) == (
        f"{opening}First.</s>\nUSER: Two?\nASSISTANT: Second.</s>\nUSER: Three?\nASSISTANT: "
    )
    learnt = [label for label in labels if label != -100]
    assert tokenizer.decode(learnt) == "First.</s>Second.</s>"
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))


@pytest.mark.parametrize("answered", [1, 2])
def test_a_conversation_only_grows(answered, tokenizer):
    turns = [("One?", "First."), ("Two?", "Second.")][:answered]
    before, _ = encode_chat(tokenizer, turns)
    after, _ = encode_chat(tokenizer, [*turns, ("And then?", None)])
    assert after[: len(before)] == before
    assert len(after) > len(before)


def test_braces_in_a_question_are_text(tokenizer):
    ids, _ = encode_chat(tokenizer, [("What does {input} mean in {}?", None)])
    assert "USER: What does {input} mean in {}?\n" in tokenizer.decode(ids)


def test_the_servers_template_spells_as_training_does(tokenizer):
    """Of earlier answers only the text is the same: there, tokens may join across the colon."""
    tokenizer.chat_template = (Path(__file__).resolve().parents[2] / "script/inference/vicuna.jinja").read_text()
    one = [{"role": "user", "content": " Größe?\n"}]
    spelt = tokenizer.apply_chat_template(one, tokenize=False)
    assert tokenizer(spelt, add_special_tokens=False).input_ids == encode_chat(tokenizer, [(" Größe?\n", None)])[0]
    more = [{"role": "system", "content": "Be brief."}, *one, {"role": "assistant", "content": "Yes."}, *one]
    text = tokenizer.apply_chat_template(more, tokenize=False)
    assert text == "Be brief.\nUSER: Größe?\nASSISTANT: Yes.</s>\nUSER: Größe?\nASSISTANT: "
    turns = [("Größe?", "Yes."), ("Größe?", None)]
    assert text == tokenizer.decode(encode_chat(tokenizer, turns, "Be brief.")[0])
