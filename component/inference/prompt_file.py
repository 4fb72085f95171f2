"""Which prompts of a file remain to be answered? JSONL in, JSONL out; an interrupted run can be resumed.

What the answers depend on is kept beside them, in FILE.settings.json: a run with other settings does not go on.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from component.data.record import text_problem
from component.error import UserError
from component.storage.atomic import atomic_file
from component.storage.claim import Paths, claimed

Record = dict[str, Any]
PROMPT_KEYS = ("prompt", "text", "input")
ADDED_KEYS = ("completion", "prompt_tokens", "completion_tokens")  # in each answered record


def read_prompts(path: str) -> list[tuple[str, Record]]:
    """(prompt, record) of every line of a JSONL file that is not blank.

    Raises:
        UserError: no such file, a line without a prompt, or one with a key that its answer would overwrite.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--input_jsonl: there is no file {path}; name a file of lines like {{'prompt': …}}")
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            found.append(_prompt_of(line, f"{path}:{number}"))
    return found


def _prompt_of(line: bytes, place: str) -> tuple[str, Record]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8, or nested too deeply
        raise UserError(f"{place}: not JSON in UTF-8 ({error}); write one object per line") from error
    keys = [key for key in PROMPT_KEYS if isinstance(record, dict) and isinstance(record.get(key), str)]
    if not keys or not record[keys[0]].strip():
        raise UserError(f'{place}: no prompt; write {{"prompt": "…"}} (or "text", or "input")')
    if problem := text_problem(record[keys[0]]):
        raise UserError(f'{place}: "{keys[0]}" {problem}')
    if taken := [key for key in ADDED_KEYS if key in record]:
        raise UserError(f'{place}: "{taken[0]}" would be overwritten by that of the answer; rename it')
    return record[keys[0]], record


def settings_path(path: str) -> Path:
    return Path(f"{path}.settings.json")


@contextlib.contextmanager
def held_output(path: str, read: Paths, settings: Record) -> Iterator[None]:
    """Hold the output file for this program, new or with answers that were made with the same settings.

    Args:
        read: what the program reads, by flag.
        settings: what the answers depend on, by flag.

    Raises:
        UserError: another process writes it, it is read too, or its settings were others.
    """
    beside = settings_path(path)
    known = _known_settings(beside)
    resumed = [Path(path), *([] if known is None else [beside])]
    with claimed({"--output_jsonl": [path, beside]}, read, resumed=resumed):
        has_answers = Path(path).exists() and Path(path).stat().st_size > 0
        known = _known_settings(beside)  # again, now that nobody else writes it
        if has_answers and known is None:
            warning = f"{path} has no {beside.name} beside it: whether its answers had the same settings is not known"
            print(warning, file=sys.stderr, flush=True)
        elif has_answers and known is not None:
            _refuse_others(path, known, settings)
        with atomic_file(beside) as writing:
            writing.write_text(json.dumps({"answers": settings}, indent=2) + "\n", encoding="utf-8")
        yield


def _known_settings(file: Path) -> Record | None:
    """What `held_output` wrote; None if there is no such file, or it is another program's."""
    try:
        known = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return known["answers"] if isinstance(known, dict) and isinstance(known.get("answers"), dict) else None


def _refuse_others(path: str, known: Record, settings: Record) -> None:
    settings = json.loads(json.dumps(settings))
    hashes = ("adapter_sha256", "base_fingerprint", "adapter_fingerprint")  # older files lack them
    known = {**{name: settings.get(name) for name in hashes}, **known}
    changed = [name for name in {**known, **settings} if known.get(name) != settings.get(name)]
    if changed:
        flag = {  # what no flag sets
            "prefill_tokens": "tokens per forward pass, by free GPU memory:",
            "adapter_sha256": "an adapter with the sha256",
            "base_fingerprint": "weights, config and tokenizer of the base with the hash",
            "adapter_fingerprint": "config and tokenizer of the adapter with the hash",
        }
        was = ", ".join(f"{flag.get(name, f'--{name}')} {json.dumps(known.get(name))}" for name in changed)
        now = ", ".join(json.dumps(settings.get(name)) for name in changed)
        raise UserError(
            f"--output_jsonl: the answers in {path} were made with {was}, not {now}; use the same settings to go on, "
            "or name another file"
        )


def count_answered(path: str, records: list[Record]) -> int:
    """How many of `records`, in order, the output file answers; removes an incomplete last line.

    Raises:
        UserError: the file holds anything but answers to these prompts.
    """
    file = Path(path)
    if not file.exists():
        return 0
    content = file.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    lines = complete.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            done = json.loads(line)
            asked = {key: done[key] for key in done if key not in ADDED_KEYS}
            matches = "completion" in done and json.dumps(asked) == json.dumps(records[number - 1])  # NaN equals NaN
        except (ValueError, IndexError, TypeError, RecursionError):  # not JSON, more lines than prompts, no object
            matches = False
        if not matches:
            raise UserError(
                f"--output_jsonl: {path}:{number} is not an answer to prompt {number} of the input; name another "
                "file, or remove this one"
            )
    if len(content) > len(complete):
        with file.open("r+b") as incomplete:
            incomplete.truncate(len(complete))
    return len(lines)


def answer_all(
    path: str, records: list[Record], start: int, answer: Callable[[range], list[Record]], batch_size: int = 1
) -> None:
    """Append each record from `start` on to `path`, with the keys that `answer(numbers)` adds to those of a batch."""
    with (
        Path(path).open("a", encoding="utf-8") as out,
        tqdm(initial=start, total=len(records), unit="prompt") as bar,
    ):
        for first in range(start, len(records), batch_size):
            numbers = range(first, min(first + batch_size, len(records)))
            for number, added in zip(numbers, answer(numbers), strict=True):
                out.write(json.dumps({**records[number], **added}, ensure_ascii=False) + "\n")
            out.flush()
            bar.update(len(numbers))
