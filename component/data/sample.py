"""What does a document become? Samples of token ids and labels: cut, split, left out, and why.

A document is a line of a file, a chat, or a stretch of a file of tokens.
"""

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from component.data import IGNORE_INDEX
from component.data.document import SampleOptions, encode_file
from component.data.packing import pack_stream
from component.data.source import RecordTally

WHOLE, CUT, SPLIT, PIECE, TOO_LONG, EMPTY = range(6)  # what became of a document; PIECE: the later ones of a SPLIT
DROPPED = (TOO_LONG, EMPTY)
FIRST_LINES = 1000  # of a stream: with fewer, a few bad ones prove nothing


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
