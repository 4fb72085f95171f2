"""How many tokens has a text? As many as training counts (document.encode_texts), and told fast.

That is with what the tokenizer puts around a text, and an end-of-sequence token. LLaMA-2's tokenizer has no word
boundaries: it merges characters over a whole text, at a megabyte a second and less. But where no token of the
vocabulary has a space mark behind another character, nothing is ever merged across the start of a word; likewise at
line ends. A text's count is then the sum of its words' counts, and most words were counted before.
"""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 8  # more than any tokenizer reaches on running text
MARGIN = 1.02  # counts of parts add up to a little more or less than the whole's
CACHED_WORDS, CACHED_CHARACTERS = 2**17, 64  # how many words are remembered, up to which length
SPACE_MARK = "▁"
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
WORD = re.compile("\n|▁+[^▁\n]*|[^▁\n]+")
# how LLaMA-2 marks spaces: as files from its first converter do, or as transformers' own LlamaTokenizer does
LLAMA_STEPS = [
    {"type": "Prepend", "prepend": SPACE_MARK},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
]
LLAMA_METASPACE = {"type": "Metaspace", "replacement": SPACE_MARK, "split": False}  # no second mark before a first one


class TokenCounter:
    """Counts tokens of texts as training samples; for one process, as it remembers words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        told = json.loads(self.backend.to_str()) if self.backend else {}
        self.has_separate_words = bool(told) and _has_separate_words(told)
        self.always_prepends = bool(told) and bool(told["normalizer"])
        self.has_at_most_byte_tokens = bool(told) and _has_at_most_byte_tokens(told)
        self.added = [token["content"] for token in told.get("added_tokens", [])]
        self.words: dict[str, int] = {}
        self.around = self._count_whole([""])[0]  # beginning and end of a text

    def __call__(self, texts: list[str]) -> list[int]:
        if not self.has_separate_words:
            return self._count_whole(texts) if texts else []
        return [self._count_words(text) for text in texts]

    def is_surely_longer(self, text: str, tokens: int) -> bool:
        """Whether `text` is longer by far than `tokens`, told from its beginning; False is no answer."""
        end = CHARACTERS_PER_TOKEN * tokens
        return len(text) > 2 * end and self([text[:end]])[0] > MARGIN * tokens + 64

    def _count_whole(self, texts: list[str]) -> list[int]:
        if self.backend is None:
            encoded = [self.tokenizer(text).input_ids for text in texts]
        else:
            # straight to the library: without offsets it is half as fast again
            self.backend.no_truncation()
            self.backend.no_padding()
            encoded = [encoding.ids for encoding in self.backend.encode_batch_fast(texts)]
        return [len(ids) + (not ids or ids[-1] != self.tokenizer.eos_token_id) for ids in encoded]

    def _count_words(self, text: str) -> int:
        if any(token in text for token in self.added):  # such a token ends a word and begins another
            return self._count_whole([text])[0]
        marked = text.replace(" ", SPACE_MARK)
        is_prepended = text and (self.always_prepends or not marked.startswith(SPACE_MARK))
        words = WORD.findall(SPACE_MARK + marked if is_prepended else marked)
        new = {word for word in words if word not in self.words}
        if len(self.words) + len(new) > CACHED_WORDS:
            self.words.clear()
            new = set(words)
        for word in new:
            self.words[word] = len(self.backend.model.tokenize(word))
        tokens = self.around + sum(map(self.words.__getitem__, words))
        for word in new:
            if len(word) > CACHED_CHARACTERS:
                del self.words[word]
        return tokens


def _marks_spaces(told: dict) -> bool:
    normalizer, before = told["normalizer"], told["pre_tokenizer"]
    if normalizer is None and before:
        return before.get("prepend_scheme") in ("always", "first") and LLAMA_METASPACE.items() <= before.items()
    return before is None and (normalizer or {}).get("normalizers") == LLAMA_STEPS


def _has_separate_words(told: dict) -> bool:
    model = told["model"]
    if model["type"] != "BPE" or not _marks_spaces(told):
        return False
    # a whole text is no word of the vocabulary, and its ends are not those of its words
    if any(
        model.get(name) for name in ("ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        return False
    # unknown characters on both sides of a word's start could become one token
    if model.get("fuse_unk") and not (model.get("byte_fallback") and model["vocab"].keys() >= BYTES):
        return False
    return not any(
        SPACE_MARK in token.lstrip(SPACE_MARK) or ("\n" in token and token != "\n") for token in model["vocab"]
    )


def _has_at_most_byte_tokens(told: dict) -> bool:
    """Whether a text has no more tokens than UTF-8 bytes (and a few around it): BPE that falls back to bytes.

    A normaliser could make a text longer first; Llama's does not, where its space mark is a token.
    """
    model, before = told["model"], json.dumps(told["pre_tokenizer"])
    if model["type"] != "BPE":
        return False
    if told["normalizer"] is None and '"ByteLevel"' in before:
        return True
    return _marks_spaces(told) and bool(model.get("byte_fallback")) and SPACE_MARK in model["vocab"]
