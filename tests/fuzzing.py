"""Random damage to valid inputs, for tests that no input ends in a traceback or costs a file.

    FUZZ=50 .venv/bin/python -m pytest tests/end_to_end -k fuzz

runs fifty times as many examples as usual, with another seed each time.
"""

import copy
import hashlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from component.cli import exit_on_user_error

FACTOR = int(os.environ.get("FUZZ", "1"))
SECONDS = 30  # for one example
DEEP = 20_000  # brackets: beyond what JSON and YAML readers recurse into
NUMBERS = [0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf]
TEXTS = ["", " ", "8", "-1", "1e-5", "nan", "true", "no", "x" * 5000, "a" * 300 + ".json", "東京«ß»", "\u202e\x1b[2J"]
TEXTS += ["a\x00b", "\ud800", "../../x", "/dev/null/x", "~nobody/x", "{text", "%s", "(a+)+$", ".*", "a/b", "auto"]
VALUES = [None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], [None], [1, "a"], {"": None}, {"a": [{}]}]
# words of a command line, where NUL can't occur
WORDS = ["", "0", "1", "-1", "nan", "inf", "-inf", "1e400", "9" * 400, "0x10", "1_000", "abc", "東京", "\x1b[2J"]
WORDS += [
    "x" * 300,
    "\udcff",
    "a,b",
    "true",
    "none",
    "[1]",
    "{}",
    "a: b: c",
    "../x",
    "~nobody/x",
    "/dev/null/x",
    "@",
    ":=",
]


def examples(count: int) -> settings:
    """For tests that take `count` examples in a normal run."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def survives(call: Callable[[], object], inputs: Path) -> None:
    """`call` returns, or ends as programs do, in one message; no file in the folder `inputs` is changed or lost."""
    before = contents(inputs)
    status: object = 0
    with time_limit(SECONDS), mock.patch.object(sys, "argv", ["program"]):
        try:
            exit_on_user_error(call)()
        except SystemExit as end:
            status = end.code or 0
    assert status in (0, 1, 2)
    assert before.items() <= contents(inputs).items()


def contents(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_):
        raise AssertionError(f"no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def odd_values() -> st.SearchStrategy:
    values = st.sampled_from(VALUES)
    return (values | st.lists(values, max_size=3)).map(copy.deepcopy)


@st.composite
def damaged(draw: st.DrawFn, value: object, keys: tuple[str, ...] = ()) -> object:
    """A copy of a JSON value with one to three changes; `keys` are further ones that an object may get."""
    result = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        result = _changed(draw, result, keys)
    return result


def _changed(draw: st.DrawFn, value: object, keys: tuple[str, ...]) -> object:
    change = draw(st.sampled_from(["inside", "inside", "inside", "remove", "rename", "add", "replace", "wrap"]))
    places = (
        sorted(value, key=str) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    )
    if isinstance(value, dict) and change == "add":
        value[draw(st.sampled_from([*keys, "", "a b"]))] = draw(odd_values())
    elif change == "wrap":
        return [value]
    elif not places or change == "replace":
        return draw(odd_values())
    else:
        place = draw(st.sampled_from(places))
        if change == "inside":
            value[place] = _changed(draw, value[place], keys) if draw(st.booleans()) else draw(odd_values())
        elif change == "rename" and isinstance(value, dict):
            value[f"{place}_"] = value.pop(place)
        else:
            del value[place]
    return value


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` truncated, interrupted, repeated, overwritten or replaced."""
    place = draw(st.integers(0, len(content)))
    piece = draw(
        st.sampled_from([b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"[", b'"', b"NaN", b"9" * 5000, b"- : &a *b"])
    )
    change = draw(st.sampled_from(["cut", "insert", "overwrite", "repeat", "replace", "deep"]))
    if change == "cut":
        return content[:place]
    if change == "repeat":
        return content[:place] + content
    if change == "replace":
        return piece
    if change == "deep":
        return content[:place] + draw(st.sampled_from([b"[", b'{"a":'])) * DEEP + content[place:]
    return content[:place] + piece + content[place + (len(piece) if change == "overwrite" else 0) :]


@st.composite
def damaged_json(draw: st.DrawFn, value: object, keys: tuple[str, ...] = ()) -> bytes:
    """A JSON file: of a damaged value, or with damaged bytes."""
    if draw(st.integers(0, 3)):
        return json.dumps(draw(damaged(value, keys))).encode()
    return draw(damaged_bytes(json.dumps(value).encode()))


@st.composite
def damaged_words(draw: st.DrawFn, words: list[str], flags: tuple[str, ...] = ()) -> list[str]:
    """A command line `--flag value ...` with other values, without some, or with `flags` added."""
    result = list(words)
    for _ in range(draw(st.integers(1, 2))):
        change = draw(st.sampled_from(["value", "value", "value", "add", "remove"]))
        values = [at for at, word in enumerate(result) if not word.startswith("--")]
        if change == "value" and values:
            result[draw(st.sampled_from(values))] = draw(st.sampled_from(WORDS))
        elif change == "remove" and result:
            del result[draw(st.integers(0, len(result) - 1))]
        else:
            result += [draw(st.sampled_from([*flags, "--unknown"])), draw(st.sampled_from(WORDS))]
    return result
