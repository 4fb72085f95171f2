"""How many tokens has a text? As many as training gives it, by whichever way they are counted."""

import json
import random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import component.corpus.token_count
from component.corpus.token_count import TokenCounter
from component.data.document import SampleOptions, encode_texts
from tests.conftest import TEXTS
from tests.words import word_tokenizer

AWKWARD = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "a  b   c ",
    "\n\n a\t b",
    "a\n  b\n",
    "▁a ▁ b",
    "a\u00a0b é 東京 \U0001f600",
    "\r\n",
]
SPECIAL = ["a </s> b", "a b</s>", "<s>", "a <s>b"]


def llama_like(extra_merge: tuple[str, str] | None = None, scheme: str = "", **options) -> PreTrainedTokenizerFast:
    """LLaMA-2's construction: space marks, no word boundaries, bytes for what is unknown.

    A `scheme` marks spaces as transformers' LlamaTokenizer does.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"], "▁▁"]
    merges.append(("▁", "▁"))
    if extra_merge:
        tokens.append("".join(extra_merge))
        merges.insert(0, extra_merge)
    vocab = {token: at for at, token in enumerate(dict.fromkeys(tokens))}
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True} | options
    bpe = Tokenizer(models.BPE(vocab, merges, **options))
    if scheme:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def trained_on(text: str, tokenizer) -> int:
    ((ids, _),) = encode_texts([text], tokenizer, SampleOptions(10**6, sft=False))
    return len(ids)


def random_texts(count: int) -> list[str]:
    letters = " \n  abdehlnorstuy.«é東"
    return ["".join(random.Random(seed).choices(letters, k=200)) for seed in range(count)]


@pytest.mark.parametrize("text", [*AWKWARD, *SPECIAL, *TEXTS, *random_texts(30)])
@pytest.mark.parametrize("kind", ["byte level", "llama", "llama, always", "llama, first", "words"])
def test_as_many_as_training_counts(kind, text, tokenizer):
    scheme = kind.partition(", ")[2]
    tokenizer = {"byte level": tokenizer, "words": word_tokenizer()}.get(kind) or llama_like(scheme=scheme)
    count = TokenCounter(tokenizer)
    assert count.has_separate_words == kind.startswith("llama")
    if text.strip():  # a blank one is no training sample
        assert count([text, text]) == [trained_on(text, tokenizer)] * 2
    assert count([text]) == count._count_whole([text])


def test_a_vocabulary_with_tokens_of_two_words_is_counted_whole():
    tokenizer = llama_like(extra_merge=("e", "▁"))
    count = TokenCounter(tokenizer)
    assert not count.has_separate_words
    text = "the lazy dog does not mind the text"
    assert count([text]) == [trained_on(text, tokenizer)]
    plain = TokenCounter(llama_like())
    assert plain.has_separate_words
    assert plain([text]) != count([text]), "the merge is one that words apart would miss"


@pytest.mark.parametrize("options", [{"byte_fallback": False}, {"ignore_merges": True}, {"end_of_word_suffix": "."}])
def test_a_model_whose_words_are_not_counted_apart(options):
    tokenizer = llama_like(**options)
    count = TokenCounter(tokenizer)
    assert not count.has_separate_words
    text = "東\n京 東 the lazy dog"
    assert count([text]) == [trained_on(text, tokenizer)]


def test_few_words_are_remembered(monkeypatch):
    monkeypatch.setattr(component.corpus.token_count, "CACHED_WORDS", 20)
    count = TokenCounter(llama_like())
    for text in random_texts(20):
        assert count([text, "x" * 100]) == count._count_whole([text, "x" * 100])
        assert len(count.words) <= 60  # one text's words may be more than what is kept
        assert not any(len(word) > component.corpus.token_count.CACHED_CHARACTERS for word in count.words)


def test_what_a_tokenizer_json_keeps_of_truncation_does_not_count():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert TokenCounter(tokenizer)(["a b c d e a"]) == [8]


def test_bytes_are_a_bound(tokenizer):
    assert TokenCounter(tokenizer).has_at_most_byte_tokens
    assert TokenCounter(llama_like()).has_at_most_byte_tokens
    assert not TokenCounter(word_tokenizer()).has_at_most_byte_tokens
    for text in [*AWKWARD, *TEXTS, *random_texts(30)]:
        for each in (tokenizer, llama_like()):
            assert TokenCounter(each)([text])[0] <= len(text.encode()) + 3


def test_much_longer_texts_are_told_by_their_beginning():
    count = TokenCounter(word_tokenizer())
    assert count.is_surely_longer("a b c d " * 1000, 100)
    assert not count.is_surely_longer("a b c d " * 1000, 4000), "the beginning is not long enough to tell"
    assert not count.is_surely_longer("abcdefghijklmnop " * 1000, 500), "long words: far fewer tokens than characters"
