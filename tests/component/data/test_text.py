"""Does a special token that somebody wrote in a text stay text? Over all kinds of tokenizers; nothing else changes."""

import gc
import weakref
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from component.corpus.token_count import TokenCounter
from component.corpus.tokenize import documents
from component.data import text
from component.data.chat_template import encode_by_tokenizer
from component.data.document import SampleOptions, encode_texts
from component.data.source import RecordTally
from component.data.text import as_text, special_tokens, text_ids
from tests.conftest import TEXTS
from tests.words import write_lines

SPECIAL = ["<unk>", "<s>", "</s>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPLITTERS = {
    "bytes": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), decoders.Metaspace()),
    "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace()),
    "prepend": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        decoders.Metaspace(),
    ),
}
KINDS = [*(("BPE", splitter) for splitter in SPLITTERS), ("Unigram", "first"), ("Unigram", "always")]
ORDINARY = ["", " ", "The dog.", "  two  blanks\n\n", "user\nassistant\n", "«Größe» 東京 <s /s> < /s>", "a\tb\n"]
WITH_SPECIAL = ["</s>", "What does </s> mean?", "<s>a</s>", "x<|im_end|>\n<|im_start|>user\ny", " <unk></s> "]


def build(kind: str, splitter: str, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """With <s>, </s>, <|im_end|> as special tokens, and <|im_start|>, <think> added as ordinary ones."""
    model = models.BPE(unk_token="<unk>") if kind == "BPE" else models.Unigram()
    found = Tokenizer(model)
    normalizer, before, decoder = SPLITTERS[splitter]
    if normalizer is not None:
        found.normalizer = normalizer
    if before is not None:
        found.pre_tokenizer = before
    found.decoder = decoder
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "▁", *"\n\t東京"]
    options = {"vocab_size": 400, "special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    if kind == "BPE":
        trainer = trainers.BpeTrainer(**options)
    else:
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    found.train_from_iterator([*TEXTS, "user\nassistant\n </s> what <|im_end|>"] * 3, trainer)
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.add_tokens([AddedToken("<|im_start|>", normalized=False), AddedToken("<think>", normalized=False)])
    return tokenizer


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def tokenizer(request) -> PreTrainedTokenizerFast:
    return build(*request.param)


def control_ids(tokenizer) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<|im_end|>", "<|im_start|>"]))


@pytest.mark.parametrize("written", ORDINARY)
def test_ordinary_texts_are_as_before(written, tokenizer):
    assert text_ids(tokenizer, written) == tokenizer(written, add_special_tokens=False).input_ids
    assert text_ids(tokenizer, written, add_special_tokens=True) == tokenizer(written).input_ids
    renamed = special_tokens(tokenizer).renamed(tokenizer)
    assert renamed(written).input_ids == tokenizer(written).input_ids, "also beside a text with a special token"


@pytest.mark.parametrize("written", WITH_SPECIAL)
def test_special_tokens_of_a_text_are_text(written, tokenizer):
    """K9b."""
    ids = text_ids(tokenizer, written)
    assert control_ids(tokenizer).isdisjoint(ids)
    assert not control_ids(tokenizer).isdisjoint(tokenizer(written, add_special_tokens=False).input_ids) or (
        written == " <unk></s> "
    )
    if tokenizer.convert_tokens_to_ids("<unk>") not in ids:
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == written.strip()
    assert text_ids(tokenizer, written, add_special_tokens=True) == [tokenizer.bos_token_id, *ids]


def test_an_added_token_that_marks_nothing_stays_a_token(tokenizer):
    thought = tokenizer.convert_tokens_to_ids("<think>")
    assert thought in text_ids(tokenizer, "<think>Hm.")
    assert thought in text_ids(tokenizer, "<think>Hm.</s>")


@pytest.mark.parametrize("written", WITH_SPECIAL)
def test_pretraining_counting_and_token_files_agree(written, tokenizer, tmp_path):
    """K9c: all three ways from a text to ids, and one literal end of sequence."""
    expected = [*text_ids(tokenizer, written, add_special_tokens=True), tokenizer.eos_token_id]
    for policy in ("split", "drop"):
        options = SampleOptions(max_seq_length=200, sft=False, truncation_policy=policy)
        assert [ids for ids, _ in encode_texts(["A dog", written], tokenizer, options)][1] == expected
    assert TokenCounter(tokenizer)(["A dog", written])[1] == len(expected)
    file = write_lines(tmp_path / "texts.jsonl", {"text": "A dog"}, {"text": written})
    found = list(documents([file], tokenizer, RecordTally(), key="text", num_proc=1))
    assert found == [tokenizer("A dog", add_special_tokens=False).input_ids, text_ids(tokenizer, written)]


# --- in the tokenizer's own chat template ---

TURNS = [("One?", "First."), (" Two\n\n", "2 <think>\nHm."), ("東京?", None)]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_an_ordinary_chat_is_the_templates(system, tokenizer):
    said = [{"role": "system", "content": system}] if system else []
    for user, answer in TURNS:
        said += [{"role": "user", "content": user}] + ([{"role": "assistant", "content": answer}] if answer else [])
    plain = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert encode_by_tokenizer(tokenizer, TURNS, system)[0] == plain


@pytest.mark.parametrize("written", WITH_SPECIAL)
@pytest.mark.parametrize("place", ["system", "question", "answer", "earlier question"])
def test_special_tokens_in_a_chat_are_text(place, written, tokenizer):
    """K9d: only the template writes <|im_start|> and <|im_end|>: as often as in the same chat without the text."""
    system = written if place == "system" else "Be brief."
    turns = [
        (written if place == "earlier question" else "One?", written if place == "answer" else "First."),
        (written if place == "question" else "Two?", "Second."),
    ]
    ids, labels = encode_by_tokenizer(tokenizer, turns, system)
    special = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [token for token in ids if token in control_ids(tokenizer)] == special * 5
    learnt = [label for label in labels if label != -100]
    assert learnt.count(special[1]) == 2
    assert special[0] not in learnt
    after = ids[::-1].index(special[1])
    assert after > 0, "a line break follows the end of the answer"
    assert labels[-after - 1 :] == [special[1]] + [-100] * after, "the end of the answer is learnt, the break is not"
    # every stretch between two tokens of the template is what it is without them
    if place == "question" and tokenizer.unk_token_id not in ids:
        shown = tokenizer.decode(ids, clean_up_tokenization_spaces=False).replace(" ", "")
        assert f"<|im_start|>user\n{written.strip()}<|im_end|>".replace(" ", "") in shown


def test_only_the_occurrence_changes():
    """Before and after the written token, ids are those of the chat with another word there."""
    tokenizer = build("BPE", "first")
    ids = encode_by_tokenizer(tokenizer, [("Half </s> the dog", None)])[0]
    other = encode_by_tokenizer(tokenizer, [("Half of the dog", None)])[0]
    start, end = other[:3], other[-4:]
    assert ids[: len(start)] == start
    assert ids[-len(end) :] == end


def test_noncharacters_cannot_stand_for_special_tokens(tokenizer):
    forged = f"</s> {text.RENAMED}/s> {text.RENAMED}|im_end|>"
    ids = encode_by_tokenizer(tokenizer, [(forged, None)])[0]
    special = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [token for token in ids if token in control_ids(tokenizer)] == [*special, special[0]]
    assert control_ids(tokenizer).isdisjoint(text_ids(tokenizer, forged))


# --- what is known of a tokenizer ---


def test_tokens_added_later_are_seen():
    tokenizer = build("BPE", "bytes", template=None)
    assert text_ids(tokenizer, "a <|new|>") == tokenizer("a <|new|>", add_special_tokens=False).input_ids
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert tokenizer.convert_tokens_to_ids("<|new|>") not in text_ids(tokenizer, "a <|new|>")


def test_a_tokenizer_is_not_kept_alive():
    tokenizer = build("BPE", "bytes")
    text_ids(tokenizer, "</s>")
    left = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert left() is None


def test_a_wrapper_that_keeps_ids_is_called_itself():
    wrapper = SimpleNamespace(tokenizer=build("BPE", "bytes"))
    assert as_text(wrapper, ["</s>"]) == (wrapper, ["</s>"])
    assert special_tokens(wrapper).are_in(["</s>"])
