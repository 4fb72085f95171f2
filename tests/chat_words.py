"""A tokenizer with one token per word, including those of Vicuna's prompt, and texts in these words."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from component.data.sample import CUT, EMPTY, PIECE, SPLIT, TOO_LONG, WHOLE

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
WORDS = ["<s>", "</s>", "<unk>", "a", "b", "c", "d", "e", "USER:", "ASSISTANT:"]
BOS, EOS, A, B, C, D, E = 0, 1, 3, 4, 5, 6, 7


def word_tokenizer(single: str = "<s> $A") -> PreTrainedTokenizerFast:
    """One id per word, in the order of WORDS; `single` is the template around a text."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*WORDS, *SYSTEM.split()]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def texts(*contents: str) -> list[dict]:
    return [{"text": content} for content in contents]


def rows(dataset) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["labels"]) for row in dataset]


PROMPT = [*SYSTEM.split(), "USER:", "a", "b", "ASSISTANT:"]


def outcomes(**counts: int) -> tuple[int, ...]:
    places = {"whole": WHOLE, "cut": CUT, "split": SPLIT, "piece": PIECE, "long": TOO_LONG, "empty": EMPTY}
    found = [0] * 6
    for name, number in counts.items():
        found[places[name]] = number
    return tuple(found)


X = -100
MANY = texts("a", "a b c", "a b c d", "a b c d e", "", "a b c d e a b")
BAD = ['{"text": 5}', '{"txt": "a"}', '["text"]', '{"text": "a"', '{"text": null}']


def with_bad_lines(tmp_path: Path, good: int, bad: int) -> str:
    """A file of `good` valid lines with `bad` unusable ones in the middle."""
    lines = ['{"text": "a"}'] * (good // 2) + BAD[:bad] + ['{"text": "b"}'] * (good - good // 2)
    (tmp_path / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(tmp_path / "data.jsonl")
