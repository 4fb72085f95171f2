"""How is read what somebody else wrote?"""

import errno
import json

import pytest

from component.error import UserError
from component.storage.foreign import read_object, reading


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("two\n  lines"), "two lines"),
        (MemoryError(), "MemoryError: "),
        (type("PanicException", (BaseException,), {})("in Rust"), "PanicException: in Rust"),
        (ValueError("set trust_remote_code=True"), "it requires trust_remote_code, which is not supported"),
    ],
)
def test_k15_every_exception_becomes_one_message(error, reason):
    with pytest.raises(UserError) as refusal, reading("FILE is damaged", "download it again"):
        raise error
    assert str(refusal.value) == f"FILE is damaged ({reason}); download it again"


@pytest.mark.parametrize(
    "error",
    [UserError("ours"), OSError(errno.ENOSPC, "disk"), RuntimeError("CUDA out of memory"), KeyboardInterrupt()],
)
def test_what_is_not_the_files_fault_passes(error):
    with pytest.raises(type(error)) as raised, reading("FILE is damaged", "download it again"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "it is nested too deeply"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "it is nested too deeply"),
        ("[]", "it is no object"),
        ("", "Expecting value"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": [-Infinity]}', "-Infinity is not a finite number"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("\xff", "can't decode"),
    ],
)
def test_k15_json(tmp_path, text, reason):
    file = tmp_path / "file.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"{file} is not valid JSON") as refusal:
        read_object(file)
    assert reason in str(refusal.value)


def test_an_object(tmp_path):
    (tmp_path / "file.json").write_text('{"a": [1, 2.5e-5, null, "\\u00e9"]}')
    assert read_object(tmp_path / "file.json") == {"a": [1, 2.5e-5, None, "é"]}


def test_a_file_of_any_size(tmp_path, monkeypatch):
    (tmp_path / "file.json").write_text(json.dumps({"a": "x" * 100}))
    monkeypatch.setattr("component.storage.foreign.MAX_JSON_BYTES", 99)
    with pytest.raises(UserError, match="it has 109 bytes, more than 99"):
        read_object(tmp_path / "file.json")
