"""How is one document tokenized and labelled? A text, a chat, or a span of a token file."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from component.data import IGNORE_INDEX
from component.data.chat_template import encode_conversation
from component.data.reader import BadRecord
from component.data.record import read_chat
from component.data.source import RecordTally, read_usable
from component.data.text import as_text
from component.data.token_file import check_tokenizer, read_index, read_tokens
from component.error import UserError

POLICIES = ("truncate", "split", "drop")
Encoded = tuple[list[int], list[int]]  # token ids, labels
BATCH_TEXTS = 64  # tokenized at a time, on all cores


@dataclass(frozen=True)
class SampleOptions:
    """How records become samples; part of the cache key of tokenized samples."""

    max_seq_length: int  # in tokens
    sft: bool
    truncation_policy: str = "truncate"  # of longer samples: truncate, split or drop
    template: str = "vicuna"  # of chats: component/data/chat_template.py
    max_bad_fraction: float = 0.01  # of unusable lines; more are an error
    vocab_size: int | None = None  # rows of the model's embedding; None: the tokenizer's tokens


def encode_file(
    file: Path, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, tally: RecordTally
) -> Iterator[Encoded | BadRecord]:
    """(ids, labels) of each document of `file`, not yet truncated; both empty for an empty text.

    Valid records that can't be encoded for this model are a `BadRecord` with file and line: its template rejects them,
    or they have tokens that the model lacks.
    """
    if file.suffix == ".bin":
        tokens, spans = open_tokens(str(file), tokenizer, options)
        for start, end in spans:
            tally.total += 1
            ids = tokens[start:end].tolist()
            yield ids, [IGNORE_INDEX, *ids[1:]]
        return
    records = tally.good(file, read_usable(file, options.sft))
    while batch := list(islice(records, BATCH_TEXTS)):
        if options.sft:
            encoded: Iterable[Encoded | str] = (_encode_chat(record, tokenizer, options) for _, record in batch)
        else:
            encoded = encode_texts([record["text"] for _, record in batch], tokenizer, options)
        for (number, _), document in zip(batch, encoded, strict=True):
            problem = document if isinstance(document, str) else _missing_token(document[0], tokenizer, options)
            if problem is None:
                yield document  # type: ignore[misc]
            else:
                tally.reject(file, number, problem)
                yield BadRecord(f"{file}:{number}: {problem}")


def _encode_chat(record: dict, tokenizer: PreTrainedTokenizerBase, options: SampleOptions) -> Encoded | str:
    """(ids, labels), or why the template rejects the chat."""
    try:
        return encode_conversation(tokenizer, *read_chat(record), options.template)
    except UserError as error:
        return str(error)


def _missing_token(ids: list[int], tokenizer: PreTrainedTokenizerBase, options: SampleOptions) -> str | None:
    rows = options.vocab_size
    if rows is None or not ids or (largest := max(ids)) < rows:
        return None
    token = tokenizer.convert_ids_to_tokens(largest)
    return f"token {largest} ({token}) is beyond the model's {rows} embedding rows; use another template or base"


def encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase, options: SampleOptions) -> Iterator[Encoded]:
    """Pretraining texts: every token but the first is a label, the end-of-sequence token included."""
    # two tokens beyond the limit tell a longer text from one that fits, without tokenizing a whole book
    limit = {} if options.truncation_policy == "split" else {"max_length": options.max_seq_length + 2}
    call, written = as_text(tokenizer, texts)
    encoded = call(written, truncation=bool(limit), **limit).input_ids
    for text, ids in zip(texts, encoded, strict=True):
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
    tokens, index = read_tokens(path, options.vocab_size or len(tokenizer), field), read_index(path)
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
