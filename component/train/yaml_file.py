"""Does a value of a YAML file have the type of its key, or can it be parsed as that type?"""

import enum
import math
import re
import types
import typing
from pathlib import Path

import yaml

from component.error import UserError, first_line, nearest


def parse_value(value: typing.Any, hint: typing.Any) -> typing.Any:
    """`value` parsed as type `hint`: '2e-4', a string in YAML 1.1, becomes a float.

    Raises:
        ValueError: it has another type.
    """
    origin = typing.get_origin(hint)
    members = sorted(_members(hint), key=lambda member: member is str)  # any string is a valid str, so try that last
    if len(members) > 1:
        if isinstance(members[0], enum.EnumMeta):  # transformers' `OptimizerNames | str`: only its names are valid
            return parse_value(value, members[0])
        for member in members:
            try:
                return parse_value(value, member)
            except ValueError:
                continue
        raise ValueError(f"{value!r} is not {_type_name(hint)}")
    if hint is typing.Any or (hint is type(None) and value is None):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return str(Path(value).expanduser()) if value.startswith("~/") else value
    if hint in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(value, hint)
    if isinstance(hint, enum.EnumMeta):
        choices: list[enum.Enum] = list(hint)
        names = [str(choice.value) for choice in choices]
        value = "no" if value is False else value  # YAML 1.1 reads `save_strategy: no` as false
        if value in names:
            return value
        raise ValueError(f"{value!r} is not one of {', '.join(names)}{nearest(str(value), names)}")
    if (origin or hint) in (dict, list) and isinstance(value, origin or hint):
        return value
    raise ValueError(f"{value!r} is not {_type_name(hint)}")


def _number(value: int | float | str, kind: type) -> int | float:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is not {_type_name(kind)}") from None
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError(f"{value!r} is not {_type_name(kind)}")
    return kind(number)


def _type_name(hint: typing.Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "empty"}
    return " or ".join(names.get(member, getattr(member, "__name__", str(member))) for member in _members(hint))


def _members(hint: typing.Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


class _NoDuplicates(yaml.SafeLoader):
    """Rejects duplicate keys, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be a plain string", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key_node.value} is set twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# YAML 1.2's numbers: YAML 1.1, which PyYAML reads, takes 1e-5 for a string
_NoDuplicates.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> typing.Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: it is not YAML, or has duplicate keys.
    """
    try:
        return yaml.load(text, Loader=_NoDuplicates)
    except (RecursionError, ValueError) as error:  # nested too deeply; a number or date that is none
        raise yaml.YAMLError(first_line(error)) from error


def read_yaml(file: str) -> dict:
    """The keys and values of a YAML file.

    Raises:
        UserError: no such file, invalid YAML, or duplicate keys.
    """
    if not Path(file).is_file():
        raise UserError(f"--train_args_file: there is no file {file}; train_args/ has examples")
    try:
        values = parse_yaml(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--train_args_file: {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--train_args_file: {file} holds no 'key: value' lines")
    return values
