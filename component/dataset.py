"""What is one training sample? {"input_ids", "labels"}, at most `max_seq_length` tokens, with something to learn.

Pretraining: the tokenizer's own beginning token, the text and, where it fits, the end-of-sequence token; every token
is a label but the first, which nothing predicts. Instruction tuning: the chat prompt is masked, the answer is learnt.
Samples are tokenised once, kept as Arrow on disk and memory-mapped, so that host memory does not grow with the data.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, List, Value
from huggingface_hub import HfApi, hf_hub_download
from transformers import PreTrainedTokenizerBase

from component.error import UserError
from component.template import IGNORE_INDEX, encode_chat

SAMPLE_FORMAT = 1  # raise it with every change of what a line becomes
MAX_REPORTED = 5  # bad lines named one by one; the rest are counted
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
        source: a file, a folder of .jsonl files, or `owner/dataset[/file.jsonl]` on the Hugging Face hub.
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


def resolve_files(source: str, field: str) -> list[Path]:
    """The JSON Lines files behind a path or a hub id."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise UserError(f"{field}: the folder {source} holds no .jsonl file; rename the files, or name one")
        return files
    parts = source.split("/")
    if len(parts) < 2 or source.startswith((".", "/", "~")):
        raise UserError(
            f"{field}: there is no file or folder {source}; name one, or owner/dataset/file.jsonl on the hub"
        )
    repository, name = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        if not name:
            names = [n for n in HfApi().list_repo_files(repository, repo_type="dataset") if n.endswith(".jsonl")]
            if len(names) != 1:
                listing = ", ".join(names) or "no .jsonl file"
                raise UserError(f"{field}: {source} holds {listing}; name one as {repository}/FILE.jsonl")
            name = names[0]
        return [Path(hf_hub_download(repository, name, repo_type="dataset"))]
    except UserError:
        raise
    except Exception as error:  # the hub client has a dozen kinds: offline, not found, gated
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{field}: there is no file {source}, and as a hub id it gave: {reason}") from error


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of the lines that are not blank.

    Raises:
        UserError: a line that is not UTF-8.
    """
    with file.open("rb") as lines:  # read as text, the file would be decoded, and refused, thousands of lines ahead
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{file}:{number}: not UTF-8 ({error.reason}); convert the file") from error
            if text.strip():
                yield number, text


def check_lines(file: Path, keys: tuple[str, ...]) -> int:
    """Count the lines; refuse the file if one is no JSON object with a text under each of `keys`."""
    bad: list[str] = []
    count = 0
    for number, line in read_lines(file):
        count += 1
        problem = _problem(line, keys)
        if problem:
            bad.append(f"{file}:{number}: {problem}")
    if bad:
        more = f"\n  and {len(bad) - MAX_REPORTED:,} more" if len(bad) > MAX_REPORTED else ""
        wanted = " and ".join(f'"{key}"' for key in keys)
        raise UserError(
            f"{len(bad):,} of {count:,} lines cannot be trained on; each must be a JSON object with {wanted} texts "
            "(sft: true takes input and output, sft: false takes text):\n  " + "\n  ".join(bad[:MAX_REPORTED]) + more
        )
    return count


def _problem(line: str, keys: tuple[str, ...]) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({getattr(error, 'msg', error)}, column {getattr(error, 'colno', 1)})"
    if not isinstance(record, dict):
        return f"{json.dumps(record)[:40]} is no object"
    for key in keys:
        if key not in record:
            return f'no "{key}" (its keys: {", ".join(map(str, record)) or "none"})'
        if not isinstance(record[key], str):
            return f'"{key}" is {json.dumps(record[key])[:40]}, not a text'
        try:
            record[key].encode()
        except UnicodeEncodeError as error:
            return f'"{key}" holds half a character, {record[key][error.start]!r}, at {error.start}; remove it'
    return None


def generate_samples(
    stamps: list[tuple[str, int, int, int]], tokenizer: PreTrainedTokenizerBase, max_seq_length: int, sft: bool
) -> Iterator[dict]:
    """The samples of checked files, in order; lines without anything to learn are left out."""
    for file, *_ in stamps:
        for _, line in read_lines(Path(file)):
            record = json.loads(line)
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
