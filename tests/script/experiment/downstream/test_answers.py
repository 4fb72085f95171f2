"""Short answers: what counts as expected, and that a model is asked in its own format."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from component.data.chat_template import encode_conversation
from component.loading import recorded_template
from script.experiment.downstream.answers import answers, words


def test_case_and_punctuation_do_not_count():
    assert words("The  Sea-Wolf, of 1904!") == ["the", "sea", "wolf", "of", "1904"]
    assert words("?") == ["?"], "nothing else could be compared"
    assert words(" ") == []


def test_answers_are_compared_with_those_expected(base_folder):
    """What the model says after a prompt is found by its own generate, and then expected, exactly and in part."""
    tokenizer, model = AutoTokenizer.from_pretrained(base_folder), AutoModelForCausalLM.from_pretrained(base_folder)
    prompt = encode_conversation(tokenizer, [("Who was it?", None)], None, recorded_template(tokenizer))[0]
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8, use_cache=False)
    said = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    first = words(said)[0]
    records = [{"input": "Who was it?", "output": expected} for expected in (said.upper(), first, "quite another")]
    found = answers(base_folder, None, records, 4)
    assert found.pop("answers") == [said] * 3
    assert found == {"questions": 3, "exact": 1 + (words(said) == [first]), "begins": 2}
