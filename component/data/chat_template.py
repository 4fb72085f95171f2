"""How is a chat parsed and formatted? By one parser and one template, for training, build_sft.py and inference.

`vicuna` is the original project's template: Vicuna's, with line breaks and without a beginning-of-sequence token, as
its published adapters were trained. `tokenizer` is the model's own chat template. With either, the loss covers the
assistant's answers and their end-of-sequence tokens, and nothing else.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from component.data import IGNORE_INDEX
from component.error import UserError, first_line

TEMPLATES = ("vicuna", "tokenizer")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = {  # names used by published data sets, in any case
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "bard", "model"), "assistant"),
}
Turns = list[
    tuple[str, str | None]
]  # (user, assistant) in order; the last answer is None if the model is to generate it


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, system: str | None = None
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation in Vicuna's format.

    Args:
        system: system prompt; None for Vicuna's own.

    Returns:
        (input_ids, labels) of equal length; labels are the ids in the answers and their end-of-sequence tokens, and
        IGNORE_INDEX elsewhere.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for turn, (user, assistant) in enumerate(turns):
        opening = f"{SYSTEM if system is None else system.strip()}\n" if turn == 0 else "\n"
        prompt_ids = tokenizer(f"{opening}USER: {user.strip()}\nASSISTANT: ", add_special_tokens=False).input_ids
        input_ids += prompt_ids
        labels += [IGNORE_INDEX] * len(prompt_ids)
        if assistant is not None:
            answer_ids = [*tokenizer(assistant.strip(), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            input_ids += answer_ids
            labels += answer_ids
    return input_ids, labels


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, system: str | None, template: str
) -> tuple[list[int], list[int]]:
    """(input_ids, labels) in the format of `template`; both empty for a conversation without turns."""
    if not turns:
        return [], []
    if template == "vicuna":
        return encode_chat(tokenizer, turns, system)
    return encode_by_tokenizer(tokenizer, turns, system)


def encode_by_tokenizer(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, system: str | None = None
) -> tuple[list[int], list[int]]:
    """(input_ids, labels) by the tokenizer's own chat template; an answer is the text it adds.

    Raises:
        UserError: there is no template, it rejects the conversation, or it rewrites earlier turns.
    """
    check_template(tokenizer)
    spans, text = [], ""
    for at, (user, assistant) in enumerate(turns):
        prompt = whole = _render(tokenizer, as_messages([*turns[:at], (user, None)], system), opens_answer=True)
        if assistant is not None:
            whole = _render(tokenizer, as_messages(turns[: at + 1], system), opens_answer=False)
            spans.append((len(prompt), len(whole.rstrip())))  # ChatML ends with a line break
        if not (prompt.startswith(text) and whole.startswith(prompt)):
            raise UserError(
                f"template: the chat template of {tokenizer.name_or_path or 'the tokenizer'} changes earlier turns "
                "when a later one follows, so the answers can't be located; use template: vicuna, or conversations "
                "of one turn"
            )
        text = whole
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # tokenizers that trim offsets, like Llama 3's, report a token of blanks as an empty span at its end
    labels = [
        token if any(start <= first and start < last <= end for start, end in spans) else IGNORE_INDEX
        for token, (first, last) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ]
    return encoded.input_ids, labels


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template or not tokenizer.is_fast:
        lack = "no fast version, which has offsets" if tokenizer.chat_template else "no chat template"
        raise UserError(f"template: tokenizer, but {tokenizer.name_or_path or 'it'} has {lack}; use template: vicuna")


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], opens_answer: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_answer)
    except Exception as error:  # jinja's own, and whatever the template raises
        reason = first_line(error)
        raise UserError(f"template: the tokenizer's chat template rejects a conversation ({reason})") from error


def turns_of(record: dict[str, Any]) -> tuple[Turns, str | None]:
    """The answered turns of an SFT record, up to the first empty answer, and its system prompt."""
    if not holds_messages(record):
        turns: Turns = [(record["input"], record["output"])]
        return (turns if record["output"].strip() else []), None
    messages, system = parse_messages(record)
    turns = []
    for (_, user), (_, assistant) in zip(messages[::2], messages[1::2], strict=False):
        if not assistant.strip():
            break
        turns.append((user, assistant))
    return turns, system


def as_messages(turns: Sequence[tuple[str, str | None]], system: str | None = None) -> list[dict[str, str]]:
    """{"role", "content"} messages; an answer of None is left out."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        said = zip(("user", "assistant"), turn, strict=True)
        messages += [{"role": role, "content": text} for role, text in said if text is not None]
    return messages


def holds_messages(record: dict[str, Any]) -> bool:
    """Whether the record is a chat rather than input and output; in tables the other kind's columns are null."""
    keys = [key for key in ("messages", "conversations") if key in record]
    return any(record[key] is not None for key in keys) or bool(keys and "input" not in record)


def messages_key(record: dict[str, Any]) -> str:
    return "conversations" if record.get("messages") is None and "conversations" in record else "messages"


def parse_messages(record: dict[str, Any]) -> tuple[list[tuple[str, str]], str | None]:
    """(role, text) of {"messages"} or {"conversations"}, user and assistant alternating, and the system prompt.

    Raises:
        ValueError: what is wrong with the record.
    """
    name = messages_key(record)
    messages = record.get(name)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"{name}" is not a list of messages')
    said = []
    for place, message in enumerate(messages, 1):
        try:
            role, content = _message(message)
            content.encode()
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
            need = f'"role" (or "from") {", ".join(ROLES)}, and "content" (or "value")'
            raise ValueError(f'"{name}": message {place} needs {need}') from error
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


def conversation_problem(record: dict[str, Any]) -> str | None:
    """What is wrong with {"messages"} or {"conversations"}, or None."""
    try:
        parse_messages(record)
    except ValueError as error:
        return str(error)
    return None
