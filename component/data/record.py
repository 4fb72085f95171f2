"""Which fields of a training record are read? Each is understood, refused by name, or listed as ignored.

Chats come as {"input", "output"}, Alpaca's {"instruction", "input", "output"} or lists of messages, with an optional
system prompt and earlier turns. Fields that other tools read and that change what is trained on are refused; all
others (ids, sources, ...) mean nothing to training, and the summary lists them.
"""

import json
from typing import Any

from component.data.chat_template import Turns
from component.data.reader import Repeated

ROLES = {  # names used by published data sets, in any case
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "bard", "model"), "assistant"),
}
CHAT_FIELDS = {"input", "output", "instruction", "system", "system_prompt", "history", "messages", "conversations"}
TEXT_FIELDS = {"text"}
MESSAGE_FIELDS = {"role", "content", "from", "value"}
_TOKENS = "records are tokenized here; remove it, or train on a .bin file"
_PREFERENCE = "preference data is not supported; remove it, or keep the chosen answer as output"
_TOOLS = "tool calls are not supported; remove such records"
_MEDIA = "only text is trained on; remove such records"
_WEIGHT = "weights and masks of records or messages are not supported; remove it, or the records that need it"
_ALIAS = 'write "input" (or "instruction") and "output"'
_THOUGHT = 'put it into "output", or remove it'
_ANSWERS = ("completion", "response", "answer", "answers", "target")
_SOURCE = 'put it into "input" with the question'
# fields that change what other tools train on, and what to do about them
REFUSED_TEXT = {
    **dict.fromkeys(("input_ids", "labels", "attention_mask", "position_ids", "loss_mask", "tokens"), _TOKENS),
    **dict.fromkeys(("weight", "weights", "loss_weight", "train", "training", "mask", "loss"), _WEIGHT),
    **dict.fromkeys(("train_detail", "training_detail", "sample_weight"), _WEIGHT),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
}
REFUSED_CHAT = {
    **REFUSED_TEXT,
    **dict.fromkeys(("chosen", "rejected", "kto_tag", "margin"), _PREFERENCE),
    **dict.fromkeys(("tools", "functions", "function_call", "tool_calls", "tool_choice"), _TOOLS),
    **dict.fromkeys(("prompt", "completion", "response", "question", "answer", "answers", "query", "target"), _ALIAS),
    **dict.fromkeys(("context", "passage", "document", "documents", "knowledge"), _SOURCE),
    **dict.fromkeys(("contexts", "passages", "article", "source_text", "choices", "options"), _SOURCE),
    **dict.fromkeys(("system_message", "system_instruction", "sys_prompt"), 'write "system"'),
    **dict.fromkeys(("conversation", "dialogue", "dialog"), 'write "conversations"'),
    **dict.fromkeys(("prefix", "suffix", "examples", "demonstrations", "few_shot"), 'put it into "input"'),
    **dict.fromkeys(("thinking", "reasoning", "reasoning_content", "rationale"), _THOUGHT),
    **dict.fromkeys(("think", "thought", "thoughts", "cot", "chain_of_thought"), _THOUGHT),
}
REFUSED_MESSAGE = {
    **REFUSED_CHAT,
    **dict.fromkeys(("tool_call_id", "name", "recipient"), _TOOLS),
    **dict.fromkeys(("prefix", "partial"), "continuing an answer is not supported; remove it"),
}


def read_chat(record: dict[str, Any]) -> tuple[Turns, str | None]:
    """The answered turns of a chat record, and its system prompt.

    A trailing turn without an answer has nothing to train on and is left out.

    Raises:
        ValueError: what is wrong with the record, or which of its fields would be ignored.
    """
    _refuse(record, REFUSED_CHAT, CHAT_FIELDS)
    system = _system(record)
    if not holds_messages(record):
        turns: Turns = [*_history(record), (_question(record), _text(record, "output"))]
    else:
        if extra := [key for key in ("input", "output", "instruction", "history") if not _is_empty(record.get(key))]:
            raise ValueError(f'"{extra[0]}" beside "{messages_key(record)}"; keep one of the two')
        messages, own = parse_messages(record)
        if system is not None and own is not None and system.strip() != own.strip():
            raise ValueError('"system" and a system message that differs; keep one of the two')
        system = own if system is None else system
        turns = [(user, answer) for (_, user), (_, answer) in zip(messages[::2], messages[1::2], strict=False)]
    if turns and not (turns[-1][1] or "").strip():
        turns.pop()
    for number, (_, answer) in enumerate(turns, 1):
        if not (answer or "").strip():
            raise ValueError(f"answer {number} is empty, but a later one is not; fill it in or remove the turn")
    return turns, system


def chat_problem(record: dict[str, Any]) -> str | None:
    """What is wrong with a chat record, or None."""
    try:
        read_chat(record)
    except ValueError as error:
        return str(error)
    return None


def text_fields_problem(record: dict[str, Any]) -> str | None:
    """Which field of a pretraining record would be ignored though it changes training, or None."""
    try:
        _refuse(record, REFUSED_TEXT, TEXT_FIELDS)
    except ValueError as error:
        return str(error)
    return None


def ignored_fields(record: dict[str, Any], sft: bool) -> set[str]:
    """Names of the fields that mean nothing to training."""
    return {str(key) for key in record} - (CHAT_FIELDS if sft else TEXT_FIELDS)


def holds_messages(record: dict[str, Any]) -> bool:
    """Whether the record is a list of messages; in tables the columns of other kinds are null."""
    keys = [key for key in ("messages", "conversations") if key in record]
    return any(record[key] is not None for key in keys) or bool(keys and not record.keys() & {"input", "instruction"})


def messages_key(record: dict[str, Any]) -> str:
    return "conversations" if record.get("messages") is None and "conversations" in record else "messages"


def parse_messages(record: dict[str, Any]) -> tuple[list[tuple[str, str]], str | None]:
    """(role, text) of {"messages"} or {"conversations"}, user and assistant alternating, and the system prompt.

    Raises:
        ValueError: what is wrong with the record.
    """
    name = messages_key(record)
    messages = record.get(name)
    if name == "messages" and not _is_empty(messages) and not _is_empty(record.get("conversations")):
        raise ValueError('"messages" beside "conversations"; keep one of the two')
    if isinstance(messages, Repeated):
        raise ValueError(f'"{name}" {text_problem(messages)}')
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"{name}" is not a list of messages')
    said = []
    for place, message in enumerate(messages, 1):
        try:
            role, content = _message(message)
        except (KeyError, TypeError, AttributeError) as error:
            need = f'"role" (or "from") {", ".join(ROLES)}, and "content" (or "value")'
            raise ValueError(f'"{name}": message {place} needs {need}') from error
        if problem := text_problem(content):
            raise ValueError(f'"{name}": the content of message {place} {problem}')
        try:
            _refuse(message, REFUSED_MESSAGE, MESSAGE_FIELDS)
        except ValueError as error:
            raise ValueError(f'"{name}": message {place}: {error}') from error
        said.append((role, content))
    roles = [role for role, _ in said]
    system = said.pop(0)[1] if roles[0] == "system" else None
    if not said or any(role != ("user", "assistant")[place % 2] for place, (role, _) in enumerate(said)):
        problem = "user and assistant must take turns, beginning with the user"
        raise ValueError(f'"{name}": {", ".join(roles[:6])}; {problem}')
    return said, system


def _message(message: dict[str, Any]) -> tuple[str, str]:
    """(role, text) of {"role", "content"}, or of {"from", "value"} as ShareGPT has it."""
    role, text = (  # in tables the columns of the other kind are null
        message[key] if message.get(key) is not None else message[other]
        for key, other in (("role", "from"), ("content", "value"))
    )
    return ROLES[role.lower()], text


def _question(record: dict[str, Any]) -> str:
    """ "input", or Alpaca's "instruction" with "input" below it, unless that begins or ends with the instruction."""
    if _is_empty(record.get("instruction")):
        return _text(record, "input")
    instruction = _text(record, "instruction")
    if _is_empty(record.get("input")):
        return instruction
    task, text = instruction.strip(), _text(record, "input").strip()
    first, lines = ([line.strip() for line in part.splitlines()] for part in (task, text))
    is_inside = first in (lines[: len(first)], lines[-len(first) :])
    return text if is_inside else f"{task}\n\n{text}"


def _system(record: dict[str, Any]) -> str | None:
    given = [key for key in ("system", "system_prompt") if not _is_empty(record.get(key))]
    texts = [_text(record, key) for key in given]
    if len(set(texts)) > 1:
        raise ValueError('"system" and "system_prompt" differ; keep one of the two')
    return texts[0] if texts else None


def _history(record: dict[str, Any]) -> Turns:
    """Earlier turns, [[question, answer], ...], as LLaMA-Factory has them."""
    history = record.get("history")
    if _is_empty(history):
        return []
    is_pairs = isinstance(history, list) and all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in history
    )
    if not is_pairs:
        raise ValueError('"history" is not a list of [question, answer]')
    for text in (text for turn in history for text in turn):  # type: ignore[union-attr]
        if problem := text_problem(text):
            raise ValueError(f'"history": a text {problem}')
    return [(question, answer) for question, answer in history]  # type: ignore[union-attr]


def _text(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise ValueError(f'no "{key}" (its keys: {", ".join(map(str, record)) or "none"})')
    if problem := text_problem(record[key]):
        raise ValueError(f'"{key}" {problem}')
    return record[key]


def _refuse(record: dict[str, Any], refused: dict[str, str], known: set[str]) -> None:
    """Refuse fields that change training, in any case of letters; a known name in other letters is not read."""
    for key, value in record.items():
        if _is_empty(value) or key in known:
            continue
        name = str(key).strip().lower()
        cure = f'write "{name}"' if name in known else refused.get(name)
        if cure and not _changes_nothing(name, value, cure, record):
            raise ValueError(f'"{key}" would be ignored: {cure}')


def _changes_nothing(name: str, value: Any, cure: str, record: dict[str, Any]) -> bool:
    """Whether nothing is lost without a refused field: texts that the record says anyway, a document's number."""
    if cure == _WEIGHT:  # only answers are trained on
        return value in ((0, 1) if _role(record) in ("user", "system") else (1,))
    if cure == _SOURCE and str(value).isdecimal():
        return True
    parts = value if isinstance(value, list) else [value]
    if cure not in (_SOURCE, _ALIAS) or not all(isinstance(part, str) for part in parts):
        return False
    said = _said(record, is_answer=name in _ANSWERS)
    return all(any(_says(text, part.strip()) for text in said) for part in parts)


def _said(record: dict[str, Any], is_answer: bool) -> list[str]:
    """The texts of a record's answers, or of all that stands in front of them."""
    messages = [message for key in ("messages", "conversations") for message in _list(record.get(key))]
    roles = ("assistant",) if is_answer else ("user", "system")
    texts = [record.get(key) for key in (("output",) if is_answer else ("input", "instruction"))]
    for message in (record, *messages):
        if isinstance(message, dict) and _role(message) in roles:
            texts += [message.get("content"), message.get("value")]
    return [text for text in texts if isinstance(text, str)]


def _role(message: dict[str, Any]) -> str | None:
    return ROLES.get(str(message.get("role") or message.get("from")).lower())


def _says(text: str, part: str) -> bool:
    """Whether `text` holds `part`, not just inside of a word."""
    at = text.find(part) if part else -1
    while at >= 0:
        around = text[max(0, at - 1) : at] + text[at + len(part) : at + len(part) + 1]
        if not any(map(str.isalnum, around)):
            return True
        at = text.find(part, at + 1)
    return not part


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def text_problem(value: object) -> str | None:
    """Why `value` is not a text that can be encoded, or None."""
    if isinstance(value, Repeated):
        return f"is there {len(value)} times, with different values; keep one of them"
    if not isinstance(value, str):
        return f"is {json.dumps(value, default=repr)[:40]}, not a text"
    if "\0" in value:  # UTF-16, a binary file, or a download that was preallocated and broke off
        return f"is not text: it has a zero byte at {value.index(chr(0))}; convert it to UTF-8, or download it again"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character, {value[error.start]!r}, at {error.start}; remove it"
    return None
