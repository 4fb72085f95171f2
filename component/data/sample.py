"""How does a document become samples of at most `max_seq_length` tokens? Truncated, split or dropped, and counted.

A document is a text, a chat, or a span of a token file.
"""

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from component.data import IGNORE_INDEX
from component.data.document import SampleOptions, encode_file
from component.data.packing import pack_stream
from component.data.reader import BadRecord
from component.data.source import RecordTally

# outcomes of a document; PIECE: further pieces of a SPLIT one; UNUSABLE: not for this model
WHOLE, CUT, SPLIT, PIECE, TOO_LONG, EMPTY, UNUSABLE = range(7)
DROPPED = (TOO_LONG, EMPTY, UNUSABLE)
FIRST_LINES = 1000  # of a stream, before its share of bad lines is checked


def generate_samples(
    files: list[str], tokenizer: PreTrainedTokenizerBase, options: dict, stamps: list | None = None
) -> Iterator[dict]:
    """The samples of the files in order, each with its outcome; dropped ones have no tokens.

    `stamps` identify the files' contents in the cache key.
    """
    wanted = SampleOptions(**options)
    for file in files:
        for document in encode_file(Path(file), tokenizer, wanted, RecordTally()):
            if isinstance(document, BadRecord):
                yield {"input_ids": [], "labels": [], "outcome": UNUSABLE}
            else:
                yield from fit(*document, wanted, tokenizer)


def generate_stream(
    files: list[str], tokenizer: PreTrainedTokenizerBase, options: dict, packing: bool
) -> Iterator[dict]:
    """Samples to train on, packed if `packing`.

    Raises:
        UserError: as soon as too many lines are unusable.
    """
    wanted, tally = SampleOptions(**options), RecordTally()

    def usable() -> Iterator[dict]:
        for file in files:
            for document in encode_file(Path(file), tokenizer, wanted, tally):
                if tally.total >= FIRST_LINES:
                    tally.refuse_if_too_many(wanted.max_bad_fraction)
                for sample in () if isinstance(document, BadRecord) else fit(*document, wanted, tokenizer):
                    if sample.pop("outcome") not in DROPPED:
                        yield sample
        tally.refuse_if_too_many(wanted.max_bad_fraction)

    yield from pack_stream(usable(), wanted.max_seq_length) if packing else usable()


def fit(
    ids: list[int], labels: list[int], options: SampleOptions, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict]:
    """The samples of one document."""
    length, policy = options.max_seq_length, options.truncation_policy
    is_longer = len(ids) > length
    if is_longer and policy != "truncate" and len(ids) == length + 1 and ids[-1] == tokenizer.eos_token_id:
        ids, labels, is_longer = ids[:length], labels[:length], False  # only the end-of-sequence token does not fit
    if is_longer and policy == "drop":
        yield {"input_ids": [], "labels": [], "outcome": TOO_LONG}
    elif is_longer and policy == "split":
        yield from split(ids, labels, length, tokenizer)
    elif any(label != IGNORE_INDEX for label in labels[:length]):
        yield {"input_ids": ids[:length], "labels": labels[:length], "outcome": CUT if is_longer else WHOLE}
    else:
        yield {"input_ids": [], "labels": [], "outcome": EMPTY}


def split(ids: list[int], labels: list[int], length: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
    """Pieces of at most `length` tokens, each with the beginning-of-sequence token if the text has one."""
    yield {"input_ids": ids[:length], "labels": labels[:length], "outcome": SPLIT}
    head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    step = length - len(head)
    for start in range(length, len(ids), step):
        piece = [*head, *ids[start : start + step]]
        if len(piece) > 1 and piece[len(head) :] != [tokenizer.eos_token_id]:  # not an end-of-sequence token alone
            yield {"input_ids": piece, "labels": [IGNORE_INDEX, *piece[1:]], "outcome": PIECE}
