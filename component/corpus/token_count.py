"""How many tokens does a text have? The number that training counts (document.encode_texts), computed quickly.

It includes the tokenizer's special tokens and an end-of-sequence token. LLaMA-2's tokenizer has no word boundaries: it
merges characters over a whole text, at a megabyte per second or less. But if no token of the vocabulary has a space
mark after another character, nothing is merged across the start of a word, and likewise at line ends. The count of a
text is then the sum over its words, and most words are cached.
"""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from component.data.text import as_text, text_ids

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
    """Counts tokens of texts as training does; it caches words, so each process needs its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        spec = json.loads(self.backend.to_str()) if self.backend else {}
        self.has_separate_words = bool(spec) and _has_separate_words(spec)
        self.always_prepends = bool(spec) and bool(spec["normalizer"])
        self.has_at_most_byte_tokens = bool(spec) and _has_at_most_byte_tokens(spec)
        self.added = [token["content"] for token in spec.get("added_tokens", [])]
        self.words: dict[str, int] = {}
        self.around = self._count_whole([""])[0]  # special tokens around a text

    def __call__(self, texts: list[str]) -> list[int]:
        if not self.has_separate_words:
            return self._count_whole(texts) if texts else []
        return [self._count_words(text) for text in texts]

    def is_surely_longer(self, text: str, tokens: int) -> bool:
        """Whether the beginning of `text` shows that it has far more than `tokens` tokens; False proves nothing."""
        end = CHARACTERS_PER_TOKEN * tokens
        return len(text) > 2 * end and self([text[:end]])[0] > MARGIN * tokens + 64

    def _count_whole(self, texts: list[str]) -> list[int]:
        if self.backend is None:
            encoded = [text_ids(self.tokenizer, text, add_special_tokens=True) for text in texts]
        else:
            # the library directly: 1.5 times as fast without offsets
            tokenizer, texts = as_text(self.tokenizer, texts)
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts)]
        return [len(ids) + (not ids or ids[-1] != self.tokenizer.eos_token_id) for ids in encoded]

    def _count_words(self, text: str) -> int:
        if any(token in text for token in self.added):  # such a token is a word boundary
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


def _marks_spaces(spec: dict) -> bool:
    normalizer, before = spec["normalizer"], spec["pre_tokenizer"]
    if normalizer is None and before:
        return before.get("prepend_scheme") in ("always", "first") and LLAMA_METASPACE.items() <= before.items()
    return before is None and (normalizer or {}).get("normalizers") == LLAMA_STEPS


def _has_separate_words(spec: dict) -> bool:
    model = spec["model"]
    if model["type"] != "BPE" or not _marks_spaces(spec):
        return False
    # options under which a text is not the concatenation of its words
    if any(
        model.get(name) for name in ("ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        return False
    # unknown characters on both sides of a word boundary could be fused
    if model.get("fuse_unk") and not (model.get("byte_fallback") and model["vocab"].keys() >= BYTES):
        return False
    return not any(
        SPACE_MARK in token.lstrip(SPACE_MARK) or ("\n" in token and token != "\n") for token in model["vocab"]
    )


def _has_at_most_byte_tokens(spec: dict) -> bool:
    """Whether a text has at most as many tokens as UTF-8 bytes, plus special ones: BPE with byte fallback.

    A normalizer could lengthen a text first; Llama's does not, if its space mark is a token.
    """
    model, before = spec["model"], json.dumps(spec["pre_tokenizer"])
    if model["type"] != "BPE":
        return False
    if spec["normalizer"] is None and '"ByteLevel"' in before:
        return True
    return _marks_spaces(spec) and bool(model.get("byte_fallback")) and SPACE_MARK in model["vocab"]
