"""How is a chat read, and how is it formatted for the model? The same way by training, build_sft.py and chat.

`vicuna` is the original project's spelling: Vicuna's, with line breaks and without a beginning-of-sequence token, so
that its published adapters see what they were trained on. `tokenizer` is the model's own chat template.
Whatever the spelling, answers and their end-of-sequence tokens are learnt, and nothing else.
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
ROLES = {  # by the names that published data sets give them, in capitals or not
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "bard", "model"), "assistant"),
}
Turns = list[tuple[str, str | None]]  # (user, assistant) in order; None leaves the last answer to the model


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, system: str | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation as Vicuna spells it, and their labels.

    Args:
        system: what stands before the first turn; None for Vicuna's own.

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
    """The same in either spelling; nothing at all for a conversation without an answer."""
    if not turns:
        return [], []
    if template == "vicuna":
        return encode_chat(tokenizer, turns, system)
    return encode_by_tokenizer(tokenizer, turns, system)


def encode_by_tokenizer(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, system: str | None = None
) -> tuple[list[int], list[int]]:
    """(input_ids, labels) by the tokenizer's own chat template; an answer is what a longer conversation adds to it.

    Raises:
        UserError: there is no template, it refuses the conversation, or it rewrites earlier turns as it goes on.
    """
    check_template(tokenizer)
    spans, text = [], ""
    for at, (user, assistant) in enumerate(turns):
        prompt = whole = _render(tokenizer, as_messages([*turns[:at], (user, None)], system), opens_answer=True)
        if assistant is not None:
            whole = _render(tokenizer, as_messages(turns[: at + 1], system), opens_answer=False)
            spans.append((len(prompt), len(whole.rstrip())))  # ChatML puts a line break behind the end
        if not (prompt.startswith(text) and whole.startswith(prompt)):
            raise UserError(
                f"template: the chat template of {tokenizer.name_or_path or 'the tokenizer'} spells earlier turns "
                "otherwise once a later one follows, so answers cannot be told from questions; use template: vicuna, "
                "or conversations of one turn"
            )
        text = whole
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # tokenizers that trim offsets, as Llama 3's, say of a token of blanks that it is empty, and stands where it ends
    labels = [
        token if any(start <= first and start < last <= end for start, end in spans) else IGNORE_INDEX
        for token, (first, last) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ]
    return encoded.input_ids, labels


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template or not tokenizer.is_fast:
        lack = "no fast form, which knows where tokens stand" if tokenizer.chat_template else "no chat template"
        raise UserError(f"template: tokenizer, but {tokenizer.name_or_path or 'it'} has {lack}; use template: vicuna")


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], opens_answer: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_answer)
    except Exception as error:  # jinja's own, and whatever the template raises
        reason = first_line(error)
        raise UserError(f"template: the tokenizer's chat template refuses a conversation ({reason})") from error


def turns_of(record: dict[str, Any]) -> tuple[Turns, str | None]:
    """The answered turns of an SFT record, and its system text; a conversation ends at its first empty answer."""
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
    """A chat as files and templates have it; an answer that is left to the model is no message."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        said = zip(("user", "assistant"), turn, strict=True)
        messages += [{"role": role, "content": text} for role, text in said if text is not None]
    return messages


def holds_messages(record: dict[str, Any]) -> bool:
    """Whether it is a list of messages, not an input and its output; tables leave other kinds' columns empty."""
    keys = [key for key in ("messages", "conversations") if key in record]
    return any(record[key] is not None for key in keys) or bool(keys and "input" not in record)


def messages_key(record: dict[str, Any]) -> str:
    return "conversations" if record.get("messages") is None and "conversations" in record else "messages"


def parse_messages(record: dict[str, Any]) -> tuple[list[tuple[str, str]], str | None]:
    """(role, text) of {"messages"} or {"conversations"}, user and assistant in turn, and the system text before them.

    Raises:
        ValueError: with what is wrong with the record.
    """
    name = messages_key(record)
    messages = record.get(name)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"{name}" is no list of messages')
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
    role, text = (  # tables leave the columns of the other kind empty
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
