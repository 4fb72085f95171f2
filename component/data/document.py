"""How is one document tokenized and labelled? A text, a chat, or a span of a token file."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from component.data import IGNORE_INDEX
from component.data.chat_template import encode_conversation
from component.data.record import read_chat
from component.data.source import RecordTally, read_usable
from component.data.token_file import check_tokenizer, read_index, read_tokens
from component.error import UserError

POLICIES = ("truncate", "split", "drop")
BATCH_TEXTS = 64  # tokenized at a time, on all cores


@dataclass(frozen=True)
class SampleOptions:
    """How records become samples; part of the cache key of tokenized samples."""

    max_seq_length: int  # in tokens
    sft: bool
    truncation_policy: str = "truncate"  # of longer samples: truncate, split or drop
    template: str = "vicuna"  # of chats: component/data/chat_template.py
    max_bad_fraction: float = 0.01  # of unusable lines; more are an error


def encode_file(
    file: Path, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, tally: RecordTally
) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels) of each usable document of `file`, not yet truncated; both empty for an empty text."""
    if file.suffix == ".bin":
        tokens, spans = open_tokens(str(file), tokenizer, options)
        for start, end in spans:
            tally.total += 1
            ids = tokens[start:end].tolist()
            yield ids, [IGNORE_INDEX, *ids[1:]]
        return
    records = (record for _, record in tally.good(file, read_usable(file, options.sft)))
    if options.sft:
        for record in records:
            yield encode_conversation(tokenizer, *read_chat(record), options.template)
        return
    while batch := [record["text"] for record in islice(records, BATCH_TEXTS)]:
        yield from encode_texts(batch, tokenizer, options)


def encode_texts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, options: SampleOptions
) -> Iterator[tuple[list[int], list[int]]]:
    """Pretraining texts: every token but the first is a label, the end-of-sequence token included."""
    # two tokens beyond the limit tell a longer text from one that fits, without tokenizing a whole book
    limit = {} if options.truncation_policy == "split" else {"max_length": options.max_seq_length + 2}
    for text, ids in zip(texts, tokenizer(texts, truncation=bool(limit), **limit).input_ids, strict=True):
        if not text.strip():
            yield [], []
            continue
        if ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        yield ids, [IGNORE_INDEX, *ids[1:]]


def open_tokens(
    path: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, field: str = "train_file"
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The ids of a `.bin` file, and [start, end) of each document in its index; without one, the whole file."""
    if options.sft:
        raise UserError(f"{field}: {path} holds tokens of texts; chats (sft: true) are trained on from .jsonl files")
    tokens, index = read_tokens(path, len(tokenizer), field), read_index(path)
    if index is None:
        if options.truncation_policy == "truncate" and len(tokens) > options.max_seq_length:
            raise UserError(
                f"{field}: {path} has no index that says where its texts end, so only the first "
                f"{options.max_seq_length} of its {len(tokens):,} tokens would be trained on; set "
                "truncation_policy: split, or make the file again with script/data/tokenize_bin.py"
            )
        return tokens, [(0, len(tokens))]
    check_tokenizer(index, tokenizer, path)
    return tokens, list(zip(index.offsets, [*index.offsets[1:], len(tokens)], strict=True))
