"""A tokenizer with one token per word and <s> before a text, so that counts are easy to check."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = {"<s>": 0, "</s>": 1, "<unk>": 2}


def word_tokenizer(words: str = "a b c d e") -> PreTrainedTokenizerFast:
    vocabulary = SPECIALS | {word: 3 + at for at, word in enumerate(words.split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def write_lines(file: Path, *records: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read_lines(file: Path) -> list:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# words that a tokenizer trained on real text encodes as one token each
COMMON = ["the", "of", "and", "a", "to", "in", "he", "was", "his", "that", "it", "with", "as", "had", "for", "on"]


def text_of(draw: random.Random, words: int) -> str:
    """Lines of twenty common words."""
    return "\n".join(" ".join(draw.choices(COMMON, k=20)) for _ in range(words // 20))
