"""Which prompts of a file are still to be answered? JSONL in, JSONL out, and a killed run goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from component.error import UserError

Record = dict[str, Any]
PROMPT_KEYS = ("prompt", "text", "input")
ADDED_KEYS = ("completion", "prompt_tokens", "completion_tokens")  # to each record that is answered


def read_prompts(path: str) -> list[tuple[str, Record]]:
    """(prompt, its whole line) of every line of a JSONL file that is not blank.

    Raises:
        UserError: no such file, or a line without a prompt.
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
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{place}: not JSON in UTF-8 ({error}); write one object per line") from error
    keys = [key for key in PROMPT_KEYS if isinstance(record, dict) and isinstance(record.get(key), str)]
    if not keys or not record[keys[0]].strip():
        raise UserError(f'{place}: no prompt; write {{"prompt": "…"}} (or "text", or "input")')
    try:
        record[keys[0]].encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise UserError(f"{place}: no Unicode text ({error.reason}); repair it") from error
    return record[keys[0]], record


def answered(path: str, records: list[Record]) -> int:
    """How many of `records` the output file has answered, in order; a line that was cut off is removed.

    Raises:
        UserError: the file holds something else than answers to these prompts.
    """
    file = Path(path)
    if not file.absolute().parent.is_dir():
        raise UserError(f"--output_jsonl: there is no folder for {path}; make it, or name another")
    if not file.exists():
        return 0
    if not file.is_file():
        raise UserError(f"--output_jsonl: {path} is no file; name a file")
    whole = file.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            done = json.loads(line)
            matches = number <= len(records) and _asked(done) == _asked(records[number - 1]) and "completion" in done
        except (ValueError, AttributeError):
            matches = False
        if not matches:
            raise UserError(
                f"--output_jsonl: {path}:{number} is no answer to prompt {number} of the input; name another file, "
                "or remove it"
            )
    if file.stat().st_size > len(whole):
        with file.open("r+b") as cut:
            cut.truncate(len(whole))
    return len(lines)


def _asked(record: Record) -> Record:
    return {key: value for key, value in record.items() if key not in ADDED_KEYS}


def answer_all(path: str, records: list[Record], start: int, answer: Callable[[int], Record]) -> None:
    """Append to `path` each record from `start` on, with what `answer` of its number adds to it."""
    with Path(path).open("a", encoding="utf-8") as out:
        for number in tqdm(range(start, len(records)), initial=start, total=len(records), unit="prompt"):
            out.write(json.dumps({**records[number], **answer(number)}, ensure_ascii=False) + "\n")
            out.flush()
