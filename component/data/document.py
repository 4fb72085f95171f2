from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from component.data import IGNORE_INDEX
from component.data.chat_template import conversation_problem, encode_conversation, holds_messages, turns_of
from component.data.source import RecordTally, read_records, record_problem, resolve_files
from component.data.token_file import check_tokenizer, index_path, read_index, read_tokens
from component.error import UserError

POLICIES = ("truncate", "split", "drop")
BATCH_TEXTS = 64  # tokenised at a time, on all cores


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


SAMPLE_FORMAT = 3  # raise it with every change of what a line becomes


def check_source(
    source: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, field: str
) -> tuple[list[tuple], int, str]:
    """(file, its and its index's state, format) of each; lines or documents; what is wrong with some, if not too many.

    Only a file of tokens has an index, which says where its documents start.
    """
    tally = RecordTally()
    if source.endswith(".bin"):
        files = [Path(source)]
        tally.total = len(open_tokens(source, tokenizer, options, field)[1])
    else:
        files = resolve_files(source, field)
        for file in files:
            for _ in tally.good(file, read_usable(file, options)):
                pass
    try:
        bad = tally.refuse_if_too_many(options.max_bad_fraction)
    except UserError as error:
        # the commonest reason: the other kind of file
        need = 'sft: false takes lines of {"text"}, sft: true of {"input", "output"} or {"messages"}, JSON objects all'
        raise UserError(f"{field}: {error}\n{need}") from error
    # what is kept is keyed by these: neither a changed file nor changed code may be served yesterday's tokens
    stamps = [(str(file), *_state(file), *_state(index_path(file)), SAMPLE_FORMAT) for file in files]
    return stamps, tally.total, bad


def _state(file: Path) -> tuple[int, int]:
    """Size and time of a file, zeros if there is none."""
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else (0, 0)
