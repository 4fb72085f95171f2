"""What does a document become? Samples of token ids and labels: cut, split, left out, and why.

A document is a line of a file, a chat, or a stretch of a file of tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from component.data.chat_template import (
    IGNORE_INDEX,
    conversation_problem,
    encode_conversation,
    holds_messages,
    turns_of,
)
from component.data.packing import pack_stream
from component.data.source import RecordTally, read_records, record_problem
from component.data.token_file import check_tokenizer, read_index, read_tokens
from component.error import UserError

POLICIES = ("truncate", "split", "drop")
WHOLE, CUT, SPLIT, PIECE, TOO_LONG, EMPTY = range(6)  # what became of a document; PIECE: the later ones of a SPLIT
DROPPED = (TOO_LONG, EMPTY)
BATCH_TEXTS = 64  # tokenised at a time, on all cores
FIRST_LINES = 1000  # of a stream: with fewer, a few bad ones prove nothing


@dataclass(frozen=True)
class SampleOptions:
    """What a line becomes. Everything here is part of the key under which tokenised samples are kept."""

    max_seq_length: int  # in tokens
    sft: bool
    truncation_policy: str = "truncate"  # of longer samples: cut at the end, cut into pieces, or left out
    template: str = "vicuna"  # how chats are spelt; see component/data/chat_template.py
    max_bad_fraction: float = 0.01  # of lines that cannot be used; more are refused


def read_usable(file: Path, options: SampleOptions):
    """(number, record or what is wrong with it) of each line of `file`."""
    if not options.sft:
        return read_records(file, ("text",))
    return read_records(file, check=chat_problem)


def chat_problem(record: dict) -> str | None:
    if holds_messages(record):
        return conversation_problem(record)
    return record_problem(record, ("input", "output"))


def generate_samples(
    files: list[str], tokenizer: PreTrainedTokenizerBase, options: dict, stamps: list | None = None
) -> Iterator[dict]:
    """The samples of the files, in order, each with its fate; those that are left out have no tokens.

    `stamps` say which state of the files this is, for the key under which the samples are kept.
    """
    wanted = SampleOptions(**options)
    for file in files:
        for ids, labels in encode_file(Path(file), tokenizer, wanted, RecordTally()):
            yield from fit(ids, labels, wanted, tokenizer)


def generate_stream(
    files: list[str], tokenizer: PreTrainedTokenizerBase, options: dict, packing: bool
) -> Iterator[dict]:
    """What there is to train on, packed if asked.

    Raises:
        UserError: as soon as too many lines turn out to be unusable.
    """
    wanted, tally = SampleOptions(**options), RecordTally()

    def usable() -> Iterator[dict]:
        for file in files:
            for ids, labels in encode_file(Path(file), tokenizer, wanted, tally):
                if tally.total >= FIRST_LINES:
                    tally.refuse_if_too_many(wanted.max_bad_fraction)
                for sample in fit(ids, labels, wanted, tokenizer):
                    if sample.pop("fate") not in DROPPED:
                        yield sample
        tally.refuse_if_too_many(wanted.max_bad_fraction)

    yield from pack_stream(usable(), wanted.max_seq_length) if packing else usable()


def encode_file(
    file: Path, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, tally: RecordTally
) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels) of each document of `file` that can be used, whole; both empty where there is nothing in it."""
    if file.suffix == ".bin":
        tokens, spans = open_tokens(str(file), tokenizer, options)
        for start, end in spans:
            tally.total += 1
            ids = tokens[start:end].tolist()
            yield ids, [IGNORE_INDEX, *ids[1:]]
        return
    records = (record for _, record in tally.good(file, read_usable(file, options)))
    if options.sft:
        for record in records:
            yield encode_conversation(tokenizer, *turns_of(record), options.template)
        return
    while batch := [record["text"] for record in islice(records, BATCH_TEXTS)]:
        yield from encode_texts(batch, tokenizer, options)


def encode_texts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, options: SampleOptions
) -> Iterator[tuple[list[int], list[int]]]:
    """Pretraining texts: every token but the first is learnt, the end-of-sequence token included."""
    # two tokens more than fit tell "cut" from "fits", and keep the tokenizer from walking a whole book
    limit = {} if options.truncation_policy == "split" else {"max_length": options.max_seq_length + 2}
    for text, ids in zip(texts, tokenizer(texts, truncation=bool(limit), **limit).input_ids, strict=True):
        if not text.strip():
            yield [], []
            continue
        if ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        yield ids, [IGNORE_INDEX, *ids[1:]]


def fit(
    ids: list[int], labels: list[int], options: SampleOptions, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict]:
    """The samples that one document becomes."""
    length, policy = options.max_seq_length, options.truncation_policy
    is_longer = len(ids) > length
    if is_longer and policy != "truncate" and len(ids) == length + 1 and ids[-1] == tokenizer.eos_token_id:
        ids, labels, is_longer = ids[:length], labels[:length], False  # all but the end is there
    if is_longer and policy == "drop":
        yield {"input_ids": [], "labels": [], "fate": TOO_LONG}
    elif is_longer and policy == "split":
        yield from split(ids, labels, length, tokenizer)
    elif any(label != IGNORE_INDEX for label in labels[:length]):
        yield {"input_ids": ids[:length], "labels": labels[:length], "fate": CUT if is_longer else WHOLE}
    else:
        yield {"input_ids": [], "labels": [], "fate": EMPTY}


def split(ids: list[int], labels: list[int], length: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
    """A text in pieces of at most `length` tokens, each with the beginning token, if the text has one."""
    yield {"input_ids": ids[:length], "labels": labels[:length], "fate": SPLIT}
    head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    step = length - len(head)
    for start in range(length, len(ids), step):
        piece = [*head, *ids[start : start + step]]
        if len(piece) > 1 and piece[len(head) :] != [tokenizer.eos_token_id]:  # an end alone teaches nonsense
            yield {"input_ids": piece, "labels": [IGNORE_INDEX, *piece[1:]], "fate": PIECE}


def open_tokens(
    path: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, field: str = "train_file"
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The ids of a `.bin` file, and [start, end) of each of its documents: those of its index, or the whole file."""
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
