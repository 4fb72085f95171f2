"""How are published records mapped to question and answer? By a pair of templates, or a preset.

Templates name fields in braces: "{chapter}", "{question.text}" for a nested field, "{input?}" for an optional one,
"{{" for a brace. A conversation is a list of turns under `conversations` or `messages`.
"""

import string
from collections.abc import Callable
from functools import partial
from typing import Any

from component.data.record import messages_key, parse_messages, read_chat

Chat = tuple[list[tuple[str, str]], str | None]  # (question, answer) in order, and the system prompt or None
Mapping = Callable[[dict], Chat]  # raises ValueError for a bad record

# Field names are those of the published data sets; the wording around them is ours.
TEMPLATES = {
    "booksum": {
        "input": "Write a summary of the following chapter of a book.\n\n{chapter}\n\nSummary:",
        "output": "{summary_text}",
    },
}


def render(template: str, record: dict) -> str:
    """
    Raises:
        ValueError: a field is missing or not a string.
    """
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            value = _field(record, name.removesuffix("?"), is_optional=name.endswith("?"))
            parts.append(value)
    return "".join(parts).strip()


def template_problem(template: object) -> str | None:
    """What is wrong with a template, or None."""
    if not isinstance(template, str):
        return f"{template!r} is not a string"
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template)]
    except ValueError as error:
        return f"{template!r}: {error}; write {{{{ for a brace"
    names = [name for name, _, _ in fields if name is not None]
    if not names:
        return f"{template!r} names no {{field}}"
    if any(not name.removesuffix("?") for name in names) or any(spec or conversion for _, spec, conversion in fields):
        return f"{template!r}: only {{field}}, {{nested.field}} and {{field?}} are supported"
    return None


def _field(record: dict, name: str, *, is_optional: bool = False) -> str:
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, dict) or value.get(part) is None:
            if is_optional:
                return ""
            if name in record:
                raise ValueError(f'"{name}" is null, not a text')
            raise ValueError(f'no "{name}" (its keys: {", ".join(map(str, record)) or "none"})')
        value = value[part]
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is {str(value)[:40]!r}, not a text')
    return value


def template_turns(record: dict, templates: dict[str, str]) -> Chat:
    return [(render(templates["input"], record), render(templates["output"], record))], None


def conversation_turns(record: dict) -> Chat:
    """[{"from": "human", "value": ...}, {"from": "gpt", ...}] (ShareGPT, Evol-Instruct V2), or role and content."""
    if not any(isinstance(record.get(key), list) for key in ("conversations", "messages")):
        raise ValueError(f'no list "conversations" or "messages" (its keys: {", ".join(map(str, record)) or "none"})')
    said, _ = parse_messages(record)
    if len(said) % 2:
        roles = ", ".join(role for role, _ in said)
        raise ValueError(f'"{messages_key(record)}": {roles}; must be user, assistant, ...')
    return chat_turns(record)


def chat_turns(record: dict) -> Chat:
    """What training reads in the record."""
    turns, system = read_chat(record)
    return [(question.strip(), (answer or "").strip()) for question, answer in turns], system


def natural_questions_turns(record: dict) -> Chat:
    """The simplified release (question_text, document_text) or the hub's (question.text, document.tokens).

    The answer is the first annotation's short answer if any, else yes or no, else the long one; without any it is
    empty, and the record is excluded.
    """
    if "document_text" in record:
        question, words = _field(record, "question_text"), _field(record, "document_text").split(" ")
        is_html = [word.startswith("<") and word.endswith(">") for word in words]
    else:
        question, tokens = _field(record, "question.text"), _rows((record.get("document") or {}).get("tokens"))
        if not tokens:
            raise ValueError('no "document.tokens" and no "document_text"')
        words, is_html = [token["token"] for token in tokens], [bool(token["is_html"]) for token in tokens]

    def span(place: dict) -> str:
        bounds = range(max(0, place["start_token"]), max(0, place["end_token"]))
        return " ".join(words[at] for at in bounds if at < len(words) and not is_html[at])

    text = " ".join(word for word, html in zip(words, is_html, strict=True) if not html)
    prompt = f"{text}\n\nAnswer the question from the text above.\nQuestion: {question}"
    return [(prompt, _answer(_rows(record.get("annotations")), span))], None


def _answer(annotations: list[dict], span: Callable[[dict], str]) -> str:
    short = [", ".join(filter(None, map(span, _rows(each.get("short_answers"))))) for each in annotations]
    yes_no = [{"YES": "Yes", 1: "Yes", "NO": "No", 0: "No"}.get(each.get("yes_no_answer"), "") for each in annotations]
    long = [span(each["long_answer"]) for each in annotations if each.get("long_answer")]
    return next(filter(None, [*short, *yes_no, *long]), "")


def _rows(value: Any) -> list[dict]:
    """A list of objects; parquet may store it as an object of lists."""
    if isinstance(value, dict):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value or []


PRESETS: dict[str, Mapping] = {
    "input_output": chat_turns,
    "alpaca": chat_turns,  # LongAlpaca, LongQA, Alpaca
    "evol_instruct": chat_turns,  # WizardLM_evol_instruct_70k
    **{name: partial(template_turns, templates=templates) for name, templates in TEMPLATES.items()},
    "conversations": conversation_turns,
    "messages": conversation_turns,
    "natural_questions": natural_questions_turns,
}


def mapping_of(value: str | dict[str, str]) -> Mapping:
    """The mapping named by a validated YAML value."""
    return PRESETS[value] if isinstance(value, str) else partial(template_turns, templates=value)
