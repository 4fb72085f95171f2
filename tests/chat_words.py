"""A tokenizer of one id per word, the words of Vicuna's prompts among them; and texts of its words."""

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
    """One id per word, in the order of WORDS; `single` says what stands around a text."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*WORDS, *SYSTEM.split()]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def texts(*contents: str) -> list[dict]:
    return [{"text": content} for content in contents]


def rows(dataset) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["labels"]) for row in dataset]


# --- instruction tuning ---

PROMPT = [*SYSTEM.split(), "USER:", "a", "b", "ASSISTANT:"]


def outcomes(**counts: int) -> tuple[int, ...]:
    found = [0] * 6
    for name, number in counts.items():
        found[{"whole": WHOLE, "cut": CUT, "split": SPLIT, "piece": PIECE, "long": TOO_LONG, "empty": EMPTY}[name]] = (
            number
        )
    return tuple(found)


# --- longer than max_seq_length ---

X = -100


MANY = texts("a", "a b c", "a b c d", "a b c d e", "", "a b c d e a b")


# --- lines that cannot be used ---

BAD = ['{"text": 5}', '{"txt": "a"}', '["text"]', '{"text": "a"', '{"text": null}']


def with_bad_lines(tmp_path: Path, good: int, bad: int) -> str:
    """Every bad line in the middle."""
    lines = ['{"text": "a"}'] * (good // 2) + BAD[:bad] + ['{"text": "b"}'] * (good - good // 2)
    (tmp_path / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(tmp_path / "data.jsonl")
