"""Training prompts have exactly the token ids of measured prompts, and never a measured key."""

import pytest
from transformers import AutoTokenizer

from component.data import IGNORE_INDEX
from component.data.document import SampleOptions, encode_file
from component.data.sample import WHOLE, RecordTally, fit
from component.error import UserError
from component.evaluate.passkey import NEEDLE, PromptMaker, draw_key
from component.tokenizer import load_tokenizer
from script.evaluate.passkey_model import make_tokenizer
from script.experiment.downstream.passkey import write_samples
from script.experiment.downstream.passkey_samples import training_samples, with_plain_template

DEMO_BASE = "script/demo/base"  # its tokenizer was trained on real text: tokens are words


@pytest.fixture(params=["demo", "digits", "tiny"])
def any_tokenizer(request, base_folder):
    if request.param == "digits":
        return make_tokenizer()
    return AutoTokenizer.from_pretrained(DEMO_BASE if request.param == "demo" else base_folder)


class Flags:
    """The flags that samples depend on."""

    steps, tokens_per_step = 4, 1024
    lengths, depths, trials, seed = [320, 384], 2, 3, 42


def test_training_prompts_have_the_tokens_of_measured_prompts(any_tokenizer, tmp_path):
    any_tokenizer.save_pretrained(tmp_path / "model")
    folder = with_plain_template(tmp_path / "model", tmp_path / "copy")
    tokenizer, file = load_tokenizer(str(folder)), tmp_path / "train.jsonl"
    maker, longest = PromptMaker(load_tokenizer(str(tmp_path / "model"))), 512
    counts = write_samples(folder, file, longest, Flags)
    options = SampleOptions(longest, sft=True, template="tokenizer")
    encoded = list(encode_file(file, tokenizer, options, RecordTally()))  # as train.py reads the file
    assert len(encoded) == counts["samples"] > 5
    assert Flags.steps * Flags.tokens_per_step <= sum(len(ids) for ids, _ in encoded)
    lengths = set()
    for ids, labels in encoded:
        assert next(fit(ids, labels, options, tokenizer))["outcome"] == WHOLE
        supervised = [at for at, label in enumerate(labels) if label != IGNORE_INDEX]
        key = tokenizer.decode([ids[at] for at in supervised]).split()[0]
        answer, again = maker.tokens_of(f" {key}."), maker.tokens_of(f" {key}")
        prompt = ids[: -len(answer)]
        needle = maker.tokens_of(NEEDLE.format(key=key))
        start = next(at for at in range(len(ids)) if ids[at : at + len(needle)] == needle)
        filler = len(prompt) - len(maker.start) - len(needle) - len(maker.question)
        measured = maker.prompt(len(prompt), (start - len(maker.start)) / filler, key)
        assert (prompt, ids[len(prompt) :], start) == (measured.ids, answer, measured.needle_start)
        said_again = measured.needle_end - len(maker.tokens_of(f" {key} is the pass key."))
        assert supervised == [*range(said_again, said_again + len(again)), *range(len(prompt), len(ids))]
        lengths.add(len(prompt))
    assert min(lengths) < 400 < max(lengths) <= longest, "short and long prompts"


def test_measured_keys_are_not_trained_on():
    folder_tokenizer = make_tokenizer()
    folder_tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    free = list(training_samples(folder_tokenizer, 20_000, 256, set(), 1))
    keys = {turns[0][1].strip() for turns in free}
    banned = set(sorted(keys)[::2])
    kept = {turns[0][1].strip() for turns in training_samples(folder_tokenizer, 20_000, 256, banned, 1)}
    assert len(banned) > 20
    assert not kept & banned
    assert len(draw_key(42, 256, 0.5, 0)) == 5


def test_a_tokenizer_that_does_not_reproduce_prompts_is_rejected():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}{{ message.content }}{% endfor %}"
    with pytest.raises(UserError, match="--base"):
        list(training_samples(tokenizer, 10_000, 256, set(), 1))
    with pytest.raises(UserError, match="--context: 64"):
        list(training_samples(tokenizer, 10_000, 64, set(), 1))
