"""YAML values parsed as the type of their key, and values that are rejected."""

import enum
import typing

import pytest

from component.error import UserError
from component.train.yaml_file import parse_value, read_yaml


class Strategy(enum.Enum):
    NO = "no"
    STEPS = "steps"


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("2e-4", float, 2e-4),  # YAML 1.1 reads it as text
        (1, float, 1.0),
        ("1e3", int, 1000),
        (3.0, int, 3),
        ("16", int, 16),
        (True, bool, True),
        ("text", str, "text"),
        (None, int | None, None),
        ("4", int | None, 4),
        (5, int | str, 5),
        ("a", int | str, "a"),
        ("7", typing.Union[str, int], 7),  # noqa: UP007 (as transformers writes it)
        (["q_proj"], str | list[str] | None, ["q_proj"]),
        ({"a": 1}, dict | str | None, {"a": 1}),
        ("steps", Strategy, "steps"),
        (False, Strategy, "no"),  # `save_strategy: no` in YAML 1.1
        ("no", Strategy | str, "no"),
        ([1], typing.Any, [1]),
    ],
)
def test_parsed_values(value, hint, expected):
    found = parse_value(value, hint)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ("yes", bool, "'yes' is not true or false"),
        (1, bool, "1 is not true or false"),
        ("many", int, "'many' is not a whole number"),
        (1.5, int, "1.5 is not a whole number"),
        (True, int, "True is not a whole number"),
        ("2e-4x", float, "'2e-4x' is not a number"),
        ("nan", float, "'nan' is not a number"),
        (float("inf"), float, "inf is not a number"),
        (None, float, "None is not a number"),
        (5, str, "5 is not text"),
        ("many", int | None, "'many' is not a whole number or empty"),
        ("step", Strategy, "'step' is not one of no, steps (did you mean steps?)"),
        ("step", Strategy | str, "'step' is not one of no, steps"),
        ("a", list, "'a' is not list"),
    ],
)
def test_rejected_values(value, hint, words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (its message is compared below)
        parse_value(value, hint)
    assert words in str(refusal.value)


def test_read_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("sft: false\nlearning_rate: 2e-4\ntarget_modules: [q_proj, k_proj]\n")
    expected = {"sft": False, "learning_rate": 2e-4, "target_modules": ["q_proj", "k_proj"]}
    assert read_yaml(str(tmp_path / "a.yaml")) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sft: true\nsft: false\n", "sft is set twice"),
        ("[a, b]: 1\n", "a key must be a plain string"),
        ("a: [1\n", "not YAML"),
        ("", "holds no 'key: value' lines"),
        ("- a\n", "holds no 'key: value' lines"),
    ],
)
def test_invalid_files(text, words, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as refusal:
        read_yaml(str(tmp_path / "a.yaml"))
    assert words in str(refusal.value)
    assert str(tmp_path / "a.yaml") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_k21_home_in_every_key(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert parse_value("~/data/train.jsonl", str | None) == "/h/data/train.jsonl"
    assert parse_value("a ~/b", str) == "a ~/b"
