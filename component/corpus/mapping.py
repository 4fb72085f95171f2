"""How does a published record become a question and its answer? By two templates, or a preset for its shape.

Templates name fields in braces: "{chapter}", "{question.text}" for a field of a field, "{input?}" for one that may be
missing, "{{" for a brace. A conversation is a list of turns under `conversations` or `messages`.
"""

import string
from collections.abc import Callable
from functools import partial
from typing import Any

Turns = list[tuple[str, str]]  # (question, answer)
Mapping = Callable[[dict], Turns]  # raises ValueError, with what is wrong with the record

# The field names are those of the data sets as published; the wording around them is this project's.
TEMPLATES = {
    "input_output": {"input": "{input}", "output": "{output}"},
    "alpaca": {"input": "{instruction}\n\n{input?}", "output": "{output}"},  # LongAlpaca, LongQA, Alpaca
    "evol_instruct": {"input": "{instruction}", "output": "{output}"},  # WizardLM_evol_instruct_70k
    "booksum": {
        "input": "Write a summary of the following chapter of a book.\n\n{chapter}\n\nSummary:",
        "output": "{summary_text}",
    },
}
USER_NAMES, ANSWER_NAMES = ("human", "user", "prompter"), ("gpt", "assistant", "chatgpt", "bard")


def render(template: str, record: dict) -> str:
    """
    Raises:
        ValueError: a field is missing, or is no text.
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
        return f"{template!r} is no text"
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template)]
    except ValueError as error:
        return f"{template!r}: {error}; write {{{{ for a brace"
    names = [name for name, _, _ in fields if name is not None]
    if not names:
        return f"{template!r} names no {{field}}"
    if any(not name.removesuffix("?") for name in names) or any(spec or conversion for _, spec, conversion in fields):
        return f"{template!r}: only {{field}}, {{field.of_it}} and {{field?}} are known"
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


def template_turns(record: dict, templates: dict[str, str]) -> Turns:
    return [(render(templates["input"], record), render(templates["output"], record))]


def conversation_turns(record: dict) -> Turns:
    """[{"from": "human", "value": ...}, {"from": "gpt", ...}] (ShareGPT, Evol-Instruct V2), or role and content."""
    key = next((key for key in ("conversations", "messages") if isinstance(record.get(key), list)), None)
    if key is None:
        raise ValueError(f'no list "conversations" or "messages" (its keys: {", ".join(map(str, record)) or "none"})')
    said = [_said(turn, f"{key}[{at}]") for at, turn in enumerate(record[key])]
    if said and said[0][0] == "system":  # the template has a system text of its own
        said = said[1:]
    pairs = [said[at : at + 2] for at in range(0, len(said), 2)]
    if not pairs or any(tuple(role for role, _ in pair) != ("user", "assistant") for pair in pairs):
        raise ValueError(f'"{key}": {", ".join(role for role, _ in said) or "no turns"}; must be user, assistant, ...')
    return [(question.strip(), answer.strip()) for (_, question), (_, answer) in pairs]


def _said(turn: object, place: str) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise ValueError(f'"{place}" is {str(turn)[:40]!r}, no object')
    name, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(name, str) or not isinstance(text, str):
        raise ValueError(f'"{place}" lacks from and value, or role and content, as texts')
    role = "user" if name.lower() in USER_NAMES else "assistant" if name.lower() in ANSWER_NAMES else name.lower()
    return role, text


def natural_questions_turns(record: dict) -> Turns:
    """The simplified release (question_text, document_text) or the hub's (question.text, document.tokens).

    The answer is the short one of the first annotation that has one, else yes or no, else the long one; without any
    the answer is empty, and the record is left out.
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
    return [(prompt, _answer(_rows(record.get("annotations")), span))]


def _answer(annotations: list[dict], span: Callable[[dict], str]) -> str:
    short = [", ".join(filter(None, map(span, _rows(each.get("short_answers"))))) for each in annotations]
    yes_no = [{"YES": "Yes", 1: "Yes", "NO": "No", 0: "No"}.get(each.get("yes_no_answer"), "") for each in annotations]
    long = [span(each["long_answer"]) for each in annotations if each.get("long_answer")]
    return next(filter(None, [*short, *yes_no, *long]), "")


def _rows(value: Any) -> list[dict]:
    """A list of objects, also where parquet holds it as an object of lists."""
    if isinstance(value, dict):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value or []


PRESETS: dict[str, Mapping] = {
    **{name: partial(template_turns, templates=templates) for name, templates in TEMPLATES.items()},
    "conversations": conversation_turns,
    "messages": conversation_turns,
    "natural_questions": natural_questions_turns,
}


def mapping_of(value: str | dict[str, str]) -> Mapping:
    """The mapping that a checked YAML value stands for."""
    return PRESETS[value] if isinstance(value, str) else partial(template_turns, templates=value)
