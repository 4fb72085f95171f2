"""Which prompts of a file remain to be answered? JSONL in, JSONL out; an interrupted run can be resumed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from component.error import UserError

Record = dict[str, Any]
PROMPT_KEYS = ("prompt", "text", "input")
ADDED_KEYS = ("completion", "prompt_tokens", "completion_tokens")  # in each answered record


def read_prompts(path: str) -> list[tuple[str, Record]]:
    """(prompt, record) of every line of a JSONL file that is not blank.

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
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8, or nested too deeply
        raise UserError(f"{place}: not JSON in UTF-8 ({error}); write one object per line") from error
    keys = [key for key in PROMPT_KEYS if isinstance(record, dict) and isinstance(record.get(key), str)]
    if not keys or not record[keys[0]].strip():
        raise UserError(f'{place}: no prompt; write {{"prompt": "…"}} (or "text", or "input")')
    try:
        record[keys[0]].encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise UserError(f"{place}: not valid Unicode ({error.reason}); repair it") from error
    return record[keys[0]], record


def count_answered(path: str, records: list[Record]) -> int:
    """How many of `records`, in order, the output file answers; removes an incomplete last line.

    Raises:
        UserError: the file holds anything but answers to these prompts.
    """
    file = Path(path)
    if not file.absolute().parent.is_dir():
        raise UserError(f"--output_jsonl: there is no folder for {path}; make it, or name another")
    if not file.exists():
        return 0
    if not file.is_file():
        raise UserError(f"--output_jsonl: {path} is not a file; name a file")
    content = file.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    lines = complete.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            done = json.loads(line)
            asked = {key: value for key, value in records[number - 1].items() if key not in ADDED_KEYS}
            matches = "completion" in done and asked == {key: done[key] for key in done if key not in ADDED_KEYS}
        except (ValueError, IndexError, TypeError):  # not JSON, more lines than prompts, not an object
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


def answer_all(path: str, records: list[Record], start: int, answer: Callable[[int], Record]) -> None:
    """Append each record from `start` on to `path`, with the keys that `answer(number)` adds."""
    with Path(path).open("a", encoding="utf-8") as out:
        for number in tqdm(range(start, len(records)), initial=start, total=len(records), unit="prompt"):
            out.write(json.dumps({**records[number], **answer(number)}, ensure_ascii=False) + "\n")
            out.flush()
