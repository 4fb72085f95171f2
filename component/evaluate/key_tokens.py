"""Are the key tokens in a file those of these windows? Found once, they serve for every model with the same tokenizer.

The file is JSON: what decides which tokens are key (data, windows, rule, evaluator), and the positions by window.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from component.error import UserError, naming
from component.evaluate.long_ppl import KeyTokenRule
from component.evaluate.perplexity import Window
from component.storage.foreign import read_object, reading
from component.storage.result import origin, write_json

FIELD = "--key_tokens"
FORMAT = 1  # increase it with every change of the file


@dataclass
class KeyTokens:
    """Key tokens, found or to be found."""

    evaluator: str | None  # None where that of a file will do
    rule: KeyTokenRule
    protocol: str
    data_path: str
    windows: dict[int, list[Window]]  # by seq_len
    strides: dict[int, int]  # --sliding_window, by seq_len
    positions: dict[int, list[list[int]]] = field(default_factory=dict)  # by seq_len and window; ascending
    hashes_of: Callable[[str], dict[str, Any] | None] = field(
        default=lambda _: None, compare=False
    )  # of a model's files
    precision: dict[str, Any] = field(default_factory=dict, compare=False)  # of the evaluator, by flag; recorded

    @property
    def longest(self) -> int:
        """Tokens of the longest window; a file may be shorter than seq_len."""
        return max(window.end - window.start for windows in self.windows.values() for window in windows)

    def setting(self) -> dict[str, Any]:
        """What a result records."""
        rule = {f"long_ppl_{name}": value for name, value in asdict(self.rule).items()}
        return {"evaluator": self.evaluator, **rule}


def write_key_tokens(path: str, keys: KeyTokens) -> None:
    """Write the positions for all lengths, atomically."""
    lengths = [
        {
            "seq_len": seq_len,
            "sliding_window": keys.strides[seq_len],
            "windows": len(positions),
            "key_tokens": sum(map(len, positions)),
            "positions": positions,
        }
        for seq_len, positions in keys.positions.items()
    ]
    data: dict[str, Any] = {"data_path": keys.data_path, "data_sha256": _sha256(keys.data_path)}
    decisive = {**keys.setting(), "protocol": keys.protocol}
    data |= keys.precision | {"evaluator_hashes": keys.hashes_of(str(keys.evaluator))}
    write_json(path, {"format": FORMAT, **decisive, **data, "lengths": lengths, **origin()})


def read_key_tokens(path: str, wanted: KeyTokens) -> KeyTokens:
    """`wanted` with the evaluator and the positions of a file.

    Raises:
        UserError: the file is damaged, or its key tokens are those of other data, windows, rules or evaluators.
    """
    cure = "name another one; one that does not exist is written"  # this one may be anything
    problem = "is no file of key tokens"
    with naming(FIELD):
        record = read_object(Path(path), problem, cure)
    with reading(f"{FIELD}: {path} {problem}", cure):
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, this version reads {FORMAT}")
        evaluator = str(record["evaluator"])
        lengths = {row["seq_len"]: row for row in record["lengths"]}
        then, now = record.get("evaluator_hashes"), wanted.hashes_of(evaluator)  # older files have none
        if then and now and then != now:
            raise UserError(
                f"{FIELD}: {path} was found by other weights of {evaluator}; name a new file "
                "(its config and tokenizer count too)"
            )
        _refuse(path, [*_differences(record, wanted), *_different_windows(lengths, wanted)])
        for seq_len, windows in wanted.windows.items():
            _check_positions(lengths[seq_len]["positions"], windows, wanted.rule)
    positions = {seq_len: lengths[seq_len]["positions"] for seq_len in wanted.windows}
    return replace(wanted, evaluator=evaluator, positions=positions)


def _differences(record: dict[str, Any], wanted: KeyTokens) -> list[str]:
    decisive = {**wanted.setting(), "protocol": wanted.protocol}  # by flag
    different = [
        f"--{name} {record[name]} (here {value})"
        for name, value in decisive.items()
        if value is not None and record[name] != value
    ]
    if record["data_sha256"] != _sha256(wanted.data_path):
        different.insert(0, f"--data_path {record['data_path']} (here {wanted.data_path}, with other content)")
    return different


def _different_windows(lengths: dict[int, dict[str, Any]], wanted: KeyTokens) -> list[str]:
    different = []
    for seq_len, windows in wanted.windows.items():
        row, stride = lengths.get(seq_len), wanted.strides[seq_len]
        if row is None:
            different.append(f"--seq_len {' '.join(map(str, lengths)) or 'none'} (here {seq_len})")
        elif row["sliding_window"] != stride:
            different.append(f"--sliding_window {row['sliding_window']} at --seq_len {seq_len} (here {stride})")
        elif row["windows"] != len(windows):
            different.append(f"{row['windows']} windows at --seq_len {seq_len} (here {len(windows)})")
    return different


def _refuse(path: str, different: list[str]) -> None:
    if different:
        raise UserError(
            f"{FIELD}: {path} holds the key tokens of {', '.join(different)}; use the same values, or name a new file"
        )


def _check_positions(positions: list[list[int]], windows: list[Window], rule: KeyTokenRule) -> None:
    if len(positions) != len(windows):
        raise ValueError(f"positions of {len(positions)} windows, not of {len(windows)}")
    for number, (found, window) in enumerate(zip(positions, windows, strict=True)):
        first, end = max(rule.first, window.first_scored - window.start), window.end - window.start
        is_whole = all(type(position) is int and first <= position < end for position in found)
        if not is_whole or found != sorted(set(found)):
            raise ValueError(f"window {number} has positions that are no ascending numbers from {first} to {end - 1}")


def _sha256(path: str) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
