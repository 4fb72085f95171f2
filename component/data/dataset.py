"""How do files become a data set? Samples {"input_ids", "labels"}, at most `max_seq_length` tokens, none unlabelled.

Pretraining: the tokenizer's own beginning token, the text and, where it fits, the end-of-sequence token; every token
is a label but the first, which nothing predicts. Instruction tuning: questions are masked, answers are learnt.
Samples are tokenised once, kept as Arrow on disk and memory-mapped, so that host memory does not grow with the data;
or they are made while they are trained on, and nothing is kept (`streaming`).
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow.compute
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from component.data.chat_template import check_template
from component.data.document import SampleOptions, open_tokens
from component.data.packing import PackedRows
from component.data.sample import CUT, DROPPED, EMPTY, PIECE, SPLIT, TOO_LONG, generate_samples, generate_stream
from component.data.source import RecordTally, read_usable, resolve_files
from component.data.token_file import index_path
from component.error import UserError

FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "fate": Value("uint8")})
SAMPLE_FORMAT = 3  # raise it with every change of what a line becomes
SHUFFLED_SAMPLES = 256  # of a stream: one in so many is drawn next


@dataclass
class DataReport:
    """What became of a source's lines."""

    files: list[str]
    lines: int
    samples: int
    tokens: int
    outcomes: tuple[int, ...]  # documents by WHOLE, CUT, ...
    bad: str = ""  # what was said of lines that cannot be used
    packed: str = ""

    @property
    def cut(self) -> int:
        return self.outcomes[CUT]

    @property
    def dropped(self) -> int:
        """Documents without anything to learn, and those that are too long if such are left out."""
        return self.outcomes[TOO_LONG] + self.outcomes[EMPTY]

    def __str__(self) -> str:
        text = f"{self.samples:,} samples, {self.tokens:,} tokens from {', '.join(self.files)}"
        outcomes, of = self.outcomes, f"of {self.lines:,} lines"
        notes = [
            f"{outcomes[CUT]:,} cut to max_seq_length" if outcomes[CUT] else "",
            f"{outcomes[SPLIT]:,} {of} split into {outcomes[SPLIT] + outcomes[PIECE]:,} samples"
            if outcomes[SPLIT]
            else "",
            f"{outcomes[TOO_LONG]:,} {of} dropped: longer than max_seq_length" if outcomes[TOO_LONG] else "",
            f"{outcomes[EMPTY]:,} {of} dropped: nothing to learn in them" if outcomes[EMPTY] else "",
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
    """Texts, chats or tokens -> tokenised samples, and what became of the lines, or of a stream where they come from.

    Args:
        source: a file, a folder, or `owner/dataset[/file.jsonl]` on the Hugging Face hub: component/data/source.py; or
            a `.bin` file of tokens: see component/data/token_file.py.
        max_seq_length: in tokens.
        sft: lines are {"input", "output"}, {"messages"} or {"conversations"}; otherwise {"text"}.
        field: the YAML key that named `source`, for messages.
        packing: rows of whole documents, with `position_ids`, in place of samples.
        streaming: samples are made while they are asked for, shuffled a little by `seed`.
        options: the other fields of `SampleOptions`.

    Raises:
        UserError: no such file, too many lines that cannot be used (file and line named), nothing left to train on.
    """
    wanted = SampleOptions(max_seq_length, sft, **options)
    if wanted.template == "tokenizer":
        check_template(tokenizer)
    if streaming:
        files = resolve_files(source, field)
        if source.endswith(".bin"):
            open_tokens(source, tokenizer, wanted, field)  # what is wrong with it is said before any weight is loaded
        arguments = {"files": [str(file) for file in files], "tokenizer": tokenizer, "options": asdict(wanted)}
        stream = IterableDataset.from_generator(generate_stream, gen_kwargs=arguments | {"packing": packing})
        shuffled = EndlessStream(stream.shuffle(seed=seed, buffer_size=SHUFFLED_SAMPLES), f"{field}: {source}")
        return shuffled, f"streamed from {', '.join(map(str, files))}"
    dataset, lengths, report = tokenise(source, tokenizer, wanted, field)
    if not packing:
        return dataset, report
    rows = PackedRows(dataset, lengths, max_seq_length)
    report.packed = f"packed into {len(rows):,} rows, {rows.fill:.1%} full"
    return rows, report


class EndlessStream(TorchIterableDataset):
    """A shuffled stream, pass after pass, each in another order: one epoch to the Trainer.

    Of a stream that ends the Trainer does not know how many steps a pass took: resuming in a later one, it would skip
    the steps so far in the first.
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
                raise UserError(f"{self.name}: nothing to learn in it; see max_seq_length and truncation_policy")


def tokenise(
    source: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, field: str
) -> tuple[Dataset, np.ndarray, DataReport]:
    """The samples on disk, the length of each in tokens, and what became of the lines."""
    stamps, lines, bad = check_source(source, tokenizer, options, field)
    files = [file for file, *_ in stamps]
    arguments = {"files": files, "tokenizer": tokenizer, "options": asdict(options)}
    stamped = arguments | {"stamps": stamps}
    if all(sample["fate"] in DROPPED for sample in generate_samples(**arguments)):
        need = "answers, and prompts that leave room for them in max_seq_length" if options.sft else "texts"
        raise UserError(f"{field}: nothing to learn in {source} (lines: {lines}); it needs {need}")
    try:
        dataset = Dataset.from_generator(generate_samples, features=FEATURES, gen_kwargs=stamped)
    except DatasetGenerationError as error:  # it hides the message: a template refuses one conversation of many
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    outcomes = dataset.data.column("fate").to_numpy()
    lengths = pyarrow.compute.list_value_length(dataset.data.column("input_ids")).to_numpy()
    kept = np.flatnonzero(~np.isin(outcomes, DROPPED))
    if len(kept) < len(dataset):
        dataset, lengths = dataset.select(kept), lengths[kept]
    counts = tuple(np.bincount(outcomes, minlength=6).tolist())
    report = DataReport(files, lines, len(dataset), int(lengths.sum()), counts, bad)
    return dataset.remove_columns("fate"), lengths, report


def check_source(
    source: str, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, field: str
) -> tuple[list[tuple], int, str]:
    """(file, its and its index's state, format) of each; lines or documents; what is wrong with some, if not too many.

    Only a file of tokens has an index, which says where its documents start.
    """
    tally = RecordTally()
    files = resolve_files(source, field)
    for file in files:
        if file.suffix == ".bin":
            tally.total += len(open_tokens(str(file), tokenizer, options, field)[1])
        else:
            deque(tally.good(file, read_usable(file, options.sft)), maxlen=0)
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
