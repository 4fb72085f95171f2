"""Is a file of key tokens written, read and refused? What each flag's difference gives: tests/script/evaluate."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from component.error import UserError
from component.evaluate.key_tokens import KeyTokens, read_key_tokens, write_key_tokens
from component.evaluate.long_ppl import KeyTokenRule
from component.evaluate.perplexity import Window


@pytest.fixture
def keys(tmp_path) -> KeyTokens:
    """Two windows of 20 tokens, the second of which scores from 15 on, and one of 30; K + stride = 10."""
    np.arange(40, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    windows = {20: [Window(0, 1, 20), Window(5, 20, 25)], 30: [Window(0, 1, 30)]}
    positions = {20: [[10, 19], []], 30: [[12, 13]]}
    rule = KeyTokenRule(6, 4, 0.5, -3.0)
    return KeyTokens("MODEL", rule, "sliding", str(tmp_path / "tokens.bin"), windows, {20: 5, 30: 5}, positions)


@pytest.fixture
def file(keys, tmp_path) -> Path:
    write_key_tokens(str(tmp_path / "keys.json"), keys)
    return tmp_path / "keys.json"


def test_the_file(file, keys):
    found = json.loads(file.read_text())
    for name in ("command", "hardware", "date", "versions"):
        assert found.pop(name)
    assert found == {
        "format": 1,
        "evaluator": "MODEL",
        "long_ppl_context": 6,
        "long_ppl_stride": 4,
        "long_ppl_alpha": 0.5,
        "long_ppl_beta": -3.0,
        "protocol": "sliding",
        "data_path": keys.data_path,
        "data_sha256": "1ae6777b38253ada510dd25db1340e4acf5385ad8bb18f997e8b272563c50fe7",
        "evaluator_hashes": None,
        "lengths": [
            {"seq_len": 20, "sliding_window": 5, "windows": 2, "key_tokens": 2, "positions": [[10, 19], []]},
            {"seq_len": 30, "sliding_window": 5, "windows": 1, "key_tokens": 2, "positions": [[12, 13]]},
        ],
    }
    assert keys.longest == 30


@pytest.mark.parametrize("evaluator", [None, "MODEL"])
def test_what_is_written_is_read(evaluator, file, keys):
    assert read_key_tokens(str(file), replace(keys, evaluator=evaluator, positions={})) == keys


def test_some_of_the_lengths_are_enough(file, keys):
    wanted = replace(keys, windows={30: keys.windows[30]}, positions={})
    assert read_key_tokens(str(file), wanted).positions == {30: [[12, 13]]}


def test_all_differences_are_named_at_once(file, keys, tmp_path):
    np.arange(1, 41, dtype=np.uint16).tofile(tmp_path / "other.bin")
    wanted = replace(
        keys,
        evaluator="OTHER",
        rule=KeyTokenRule(6, 5, 0.5, -3.5),
        protocol="longlora",
        data_path=str(tmp_path / "other.bin"),
        windows={20: keys.windows[20], 30: keys.windows[30] * 2, 31: []},
        strides={20: 6, 30: 5, 31: 5},
    )
    with pytest.raises(UserError) as refused:
        read_key_tokens(str(file), wanted)
    assert str(refused.value) == (
        f"--key_tokens: {file} holds the key tokens of "
        f"--data_path {keys.data_path} (here {tmp_path}/other.bin, with other content), "
        "--evaluator MODEL (here OTHER), --long_ppl_stride 4 (here 5), --long_ppl_beta -3.0 (here -3.5), "
        "--protocol sliding (here longlora), --sliding_window 5 at --seq_len 20 (here 6), "
        "1 windows at --seq_len 30 (here 2), --seq_len 20 30 (here 31); use the same values, or name a new file"
    )


@pytest.mark.parametrize(
    ("positions", "part"),
    [
        ([[10, 19]], "positions of 1 windows, not of 2"),
        ([[9], []], "window 0 has positions that are no ascending numbers from 10 to 19"),
        ([[20], []], "window 0 has positions"),
        ([[11, 10], []], "window 0 has positions"),
        ([[11, 11], []], "window 0 has positions"),
        ([[11.0], []], "window 0 has positions"),
        ([[True], []], "window 0 has positions"),
        ([[], [14]], "window 1 has positions that are no ascending numbers from 15 to 19"),
        ([[], None], "TypeError"),
        (7, "TypeError"),
    ],
)
def test_positions_that_the_windows_can_not_have(positions, part, file, keys):
    record = json.loads(file.read_text())
    record["lengths"][0]["positions"] = positions
    file.write_text(json.dumps(record))
    with pytest.raises(UserError) as refused:
        read_key_tokens(str(file), keys)
    assert f"--key_tokens: {file} is no file of key tokens" in str(refused.value)
    assert part in str(refused.value)


@pytest.mark.parametrize("positions", [[[10], []], [[19], [15, 19]], [[], []]])
def test_positions_that_they_can_have(positions, file, keys):
    record = json.loads(file.read_text())
    record["lengths"][0]["positions"] = positions
    file.write_text(json.dumps(record))
    assert read_key_tokens(str(file), keys).positions[20] == positions


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"lengths": 3}, "is no file of key tokens"),
        ({"lengths": [{}]}, "is no file of key tokens"),
        ({"lengths": []}, "--seq_len none (here 20)"),
        ({"data_sha256": None}, "with other content"),
    ],
)
def test_damaged_files(changes, part, file, keys):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError) as refused:
        read_key_tokens(str(file), keys)
    assert part in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "no JSON"])
def test_other_files(text, file, keys):
    file.write_text(text)
    with pytest.raises(
        UserError, match=r"^--key_tokens: .*keys\.json is no file of key tokens .*; name another"
    ) as error:
        read_key_tokens(str(file), keys)
    assert "remove" not in str(error.value), "it may be any file of the user"
