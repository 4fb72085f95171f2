"""What is one training sample? {"input_ids", "labels"}, at most `max_seq_length` tokens, with something to learn.

Pretraining: the tokenizer's own beginning token, the text and, where it fits, the end-of-sequence token; every token
is a label but the first, which nothing predicts. Instruction tuning: the chat prompt is masked, the answer is learnt.
Samples are tokenised once, kept as Arrow on disk and memory-mapped, so that host memory does not grow with the data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from component.error import UserError
from component.source import check_lines, read_records, resolve_files
from component.template import IGNORE_INDEX, encode_chat

SAMPLE_FORMAT = 1  # raise it with every change of what a line becomes
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "cut": Value("bool")})


@dataclass
class DataReport:
    """What became of a file's lines."""

    files: list[str]
    lines: int
    samples: int
    tokens: int
    cut: int  # samples that were longer than max_seq_length
    dropped: int  # lines whose text is empty, or whose sample has no label left after cutting

    def __str__(self) -> str:
        text = f"{self.samples:,} samples, {self.tokens:,} tokens from {', '.join(self.files)}"
        notes = [f"{self.cut:,} cut to max_seq_length"] if self.cut else []
        notes += (
            [f"{self.dropped:,} of {self.lines:,} lines dropped: nothing to learn in them"] if self.dropped else []
        )
        return f"{text} ({'; '.join(notes)})" if notes else text


def load_samples(
    source: str, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, *, sft: bool, field: str = "train_file"
) -> tuple[Dataset, DataReport]:
    """JSON Lines -> tokenised samples.

    Args:
        source: a file, a folder, or `owner/dataset[/file.jsonl]` on the Hugging Face hub: see component/source.py.
        max_seq_length: in tokens; what is longer is cut at the end.
        sft: lines are {"input", "output"}; otherwise {"text"}.
        field: the YAML key that named `source`, for messages.

    Raises:
        UserError: no such file, lines that are no JSON or lack a key (file and line named), nothing left to train on.
    """
    files = resolve_files(source, field)
    keys = ("input", "output") if sft else ("text",)
    lines = sum(check_lines(file, keys) for file in files)
    # the cache is keyed by these arguments: neither a changed file nor changed code may be served yesterday's tokens
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns, SAMPLE_FORMAT) for file in files]
    arguments = {"stamps": stamps, "tokenizer": tokenizer, "max_seq_length": max_seq_length, "sft": sft}
    if next(generate_samples(**arguments), None) is None:
        need = "answers, and prompts that leave room for them in max_seq_length" if sft else "texts"
        raise UserError(f"{field}: nothing to learn in {source} (lines: {lines}); it needs {need}")
    dataset = Dataset.from_generator(generate_samples, features=FEATURES, gen_kwargs=arguments)
    tokens = sum(len(ids) for batch in dataset.iter(1000) for ids in batch["input_ids"])
    cut = sum(sum(batch["cut"]) for batch in dataset.select_columns("cut").iter(1000))
    report = DataReport([str(file) for file in files], lines, len(dataset), tokens, cut, lines - len(dataset))
    return dataset.remove_columns("cut"), report


def generate_samples(
    stamps: list[tuple[str, int, int, int]], tokenizer: PreTrainedTokenizerBase, max_seq_length: int, sft: bool
) -> Iterator[dict]:
    """The samples of checked files, in order; lines without anything to learn are left out."""
    keys = ("input", "output") if sft else ("text",)
    for file, *_ in stamps:
        for _, record in read_records(Path(file), keys):
            assert isinstance(record, dict), "the file was checked"
            input_ids, labels = (encode_answer if sft else encode_text)(record, tokenizer, max_seq_length)
            sample = {"input_ids": input_ids[:max_seq_length], "labels": labels[:max_seq_length]}
            if any(label != IGNORE_INDEX for label in sample["labels"]):
                yield {**sample, "cut": len(input_ids) > max_seq_length}


def encode_text(record: dict, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> tuple[list[int], list[int]]:
    """A pretraining text: every token but the first is learnt, the end-of-sequence token included."""
    if not record["text"].strip():
        return [], []
    # two tokens more than fit tell "cut" from "fits", and keep the tokenizer from walking a whole book
    ids = tokenizer(record["text"], truncation=True, max_length=max_seq_length + 2).input_ids
    if ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return ids, [IGNORE_INDEX, *ids[1:]]


def encode_answer(
    record: dict, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> tuple[list[int], list[int]]:
    """A question and its answer: the answer and its end-of-sequence token are learnt."""
    if not record["output"].strip():
        return [], []
    return encode_chat(tokenizer, [(record["input"], record["output"])])
