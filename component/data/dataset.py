"""How do files become a data set? Samples {"input_ids", "labels"} of at most `max_seq_length` tokens, all with labels.

Pretraining: the tokenizer's beginning-of-sequence token, the text and, where it fits, the end-of-sequence token; the
loss covers every token but the first. Instruction tuning: the loss covers answers only. Samples are tokenized once and
memory-mapped from Arrow files, so host memory does not grow with the data, or tokenized on the fly (`streaming`).
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import pyarrow.compute
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from component.data.chat_template import check_template
from component.data.document import SampleOptions, encode_file, open_tokens
from component.data.packing import PackedRows
from component.data.reader import BadRecord
from component.data.sample import (
    CUT,
    DROPPED,
    EMPTY,
    PIECE,
    SPLIT,
    TOO_LONG,
    UNUSABLE,
    generate_samples,
    generate_stream,
)
from component.data.source import MAX_REPORTED, RecordTally, read_usable, resolve_files
from component.data.token_file import index_path
from component.error import UserError

FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "outcome": Value("uint8")})
SAMPLE_FORMAT = 5
SHUFFLED_SAMPLES = 256  # size of a stream's shuffle buffer


@dataclass
class DataReport:
    """How many samples a source gave, and what was truncated, split, dropped or unusable."""

    files: list[str]
    lines: int
    samples: int
    tokens: int
    outcomes: tuple[int, ...]  # documents by WHOLE, CUT, ...
    bad: str = ""  # message about unusable lines
    packed: str = ""

    @property
    def cut(self) -> int:
        return self.outcomes[CUT]

    @property
    def dropped(self) -> int:
        """Documents without label tokens, and too long ones with truncation_policy: drop."""
        return self.outcomes[TOO_LONG] + self.outcomes[EMPTY]

    def __str__(self) -> str:
        text = f"{self.samples:,} samples, {self.tokens:,} tokens from {', '.join(self.files)}"
        outcomes, of = self.outcomes, f"of {self.lines:,} lines"
        notes = [
            f"{outcomes[CUT]:,} truncated to max_seq_length" if outcomes[CUT] else "",
            f"{outcomes[SPLIT]:,} {of} split into {outcomes[SPLIT] + outcomes[PIECE]:,} samples"
            if outcomes[SPLIT]
            else "",
            f"{outcomes[TOO_LONG]:,} {of} dropped: longer than max_seq_length" if outcomes[TOO_LONG] else "",
            f"{outcomes[EMPTY]:,} {of} dropped: no label tokens left" if outcomes[EMPTY] else "",
            self.bad,
            self.packed,
        ]
        shown = "; ".join(note for note in notes if note)
        return f"{text} ({shown})" if shown else text


def load_samples(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    *,
    sft: bool,
    field: str = "train_file",
    packing: bool = False,
    streaming: bool = False,
    seed: int = 42,
    **options,
) -> tuple["Dataset | PackedRows | EndlessStream", DataReport | str]:
    """Tokenized samples of texts, chats or token files, and a report, or for a stream the names of its files.

    Args:
        source: a file, a folder, or `owner/dataset[/file.jsonl]` on the Hugging Face hub: component/data/source.py; or
            a `.bin` file of tokens: see component/data/token_file.py.
        max_seq_length: in tokens.
        sft: lines are {"input", "output"}, {"messages"} or {"conversations"}; otherwise {"text"}.
        field: the YAML key that named `source`, for messages.
        packing: fill rows with whole samples, separated by `position_ids`.
        streaming: tokenize on the fly; shuffled in a small buffer by `seed`.
        options: the other fields of `SampleOptions`.

    Raises:
        UserError: no such file, too many unusable lines (the first are named), or no label tokens.
    """
    wanted = SampleOptions(max_seq_length, sft, **options)
    if wanted.template == "tokenizer":
        check_template(tokenizer)
    if streaming:
        files = resolve_files(source, field)
        if source.endswith(".bin"):
            open_tokens(source, tokenizer, wanted, field)  # a bad file is reported before any weight is loaded
        arguments = {"files": [str(file) for file in files], "tokenizer": tokenizer, "options": asdict(wanted)}
        stream = IterableDataset.from_generator(generate_stream, gen_kwargs=arguments | {"packing": packing})
        shuffled = EndlessStream(stream.shuffle(seed=seed, buffer_size=SHUFFLED_SAMPLES), f"{field}: {source}")
        return shuffled, f"streamed from {', '.join(map(str, files))}"
    dataset, lengths, report = tokenize(source, tokenizer, wanted, field)
    if not packing:
        return dataset, report
    rows = PackedRows(dataset, lengths, max_seq_length)
    report.packed = f"packed into {len(rows):,} rows, {rows.fill:.1%} full"
    return rows, report


class EndlessStream(TorchIterableDataset):
    """A shuffled stream, repeated without end in another order each time: one epoch for the Trainer.

    The Trainer does not know how many steps a pass over a finite stream took: a run that resumed in a later pass would
    skip its steps in the first.
    """

    def __init__(self, one_pass: IterableDataset, name: str):
        self.one_pass, self.name = one_pass, name

    def __iter__(self) -> Iterator[dict]:
        for number in count():
            self.one_pass.set_epoch(number)
            samples = 0
            for samples, sample in enumerate(self.one_pass, 1):  # noqa: B007
                yield sample
            if not samples and get_worker_info() is not None:
                return  # there are more workers than files
            if not samples:
                raise UserError(f"{self.name}: no label tokens; see max_seq_length and truncation_policy")


def tokenize(
    source: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, field: str
) -> tuple[Dataset, np.ndarray, DataReport]:
    """The samples on disk, their lengths in tokens, and the report."""
    stamps, tally = check_source(source, tokenizer, options, field)
    lines = tally.total
    files = [file for file, *_ in stamps]
    arguments = {"files": files, "tokenizer": tokenizer, "options": asdict(options)}
    stamped = arguments | {"stamps": stamps}
    if all(sample["outcome"] in DROPPED for sample in generate_samples(**arguments)):
        _refuse_unusable(tally, files, tokenizer, options, field)
        need = "answers, and prompts that leave room for them in max_seq_length" if options.sft else "texts"
        raise UserError(f"{field}: no label tokens in {source} (lines: {lines}); it needs {need}")
    try:
        dataset = Dataset.from_generator(generate_samples, features=FEATURES, gen_kwargs=stamped)
    except DatasetGenerationError as error:  # it hides the message
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    outcomes = dataset.data.column("outcome").to_numpy()
    lengths = pyarrow.compute.list_value_length(dataset.data.column("input_ids")).to_numpy()
    kept = np.flatnonzero(~np.isin(outcomes, DROPPED))
    if len(kept) < len(dataset):
        dataset, lengths = dataset.select(kept), lengths[kept]
    counts = tuple(np.bincount(outcomes, minlength=7).tolist())
    bad = _refuse_unusable(tally, files, tokenizer, options, field, counts[UNUSABLE])
    report = DataReport(files, lines, len(dataset), int(lengths.sum()), counts[:UNUSABLE], bad)
    return dataset.remove_columns("outcome"), lengths, report


def check_source(
    source: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, field: str
) -> tuple[list[tuple], RecordTally]:
    """(file, its and its index's state, format) of each, and the records, of which not too many are bad.

    Only a file of tokens has an index, which says where its documents start.
    """
    tally = RecordTally()
    files = resolve_files(source, field)
    for file in files:
        if file.suffix == ".bin":
            tally.total += len(open_tokens(str(file), tokenizer, options, field)[1])
        else:
            deque(tally.good(file, read_usable(file, options.sft), options.sft), maxlen=0)
    try:
        tally.refuse_if_too_many(options.max_bad_fraction)
    except UserError as error:
        # the commonest reason: the other kind of file
        need = 'sft: false takes lines of {"text"}, sft: true of {"input", "output"} or {"messages"}, JSON objects all'
        raise UserError(f"{field}: {error}\n{need}") from error
    # what is kept is keyed by these: neither a changed file nor changed code may be served yesterday's tokens
    stamps = [(str(file), *_state(file), *_state(index_path(file)), SAMPLE_FORMAT) for file in files]
    return stamps, tally


def _refuse_unusable(
    tally: RecordTally,
    files: list[str],
    tokenizer: PreTrainedTokenizerBase,
    options: SampleOptions,
    field: str,
    count: int | None = None,
) -> str:
    """`refuse_if_too_many`, with the `count` records that can't be encoded for this model (None: not counted yet)."""
    if count != 0:
        documents = (each for file in files for each in encode_file(Path(file), tokenizer, options, RecordTally()))
        problems = (each.problem for each in documents if isinstance(each, BadRecord))
        found = list(islice(problems, None if count is None else MAX_REPORTED))
        tally.bad += len(found) if count is None else count
        tally.first = [*tally.first, *found][:MAX_REPORTED]
    try:
        return tally.refuse_if_too_many(options.max_bad_fraction)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error


def _state(file: Path) -> tuple[int, int]:
    """Size and time of a file, zeros if there is none."""
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else (0, 0)
