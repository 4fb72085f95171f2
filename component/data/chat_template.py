"""How is a chat formatted for the model? The same way by training, build_sft.py and inference.

`vicuna` is the original project's template: Vicuna's, with line breaks and without a beginning-of-sequence token, as
its published adapters were trained. `tokenizer` is the model's own chat template. With either, the loss covers the
assistant's answers and their end-of-sequence tokens, and nothing else. Special tokens are written by the template
alone: those that somebody wrote in a question, an answer or a system prompt stay text.
"""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from component.data import IGNORE_INDEX
from component.data.template import fill_template
from component.data.text import special_tokens, text_ids
from component.error import UserError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
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
        prompt_ids = text_ids(tokenizer, f"{opening}USER: {user.strip()}\nASSISTANT: ")
        input_ids += prompt_ids
        labels += [IGNORE_INDEX] * len(prompt_ids)
        if assistant is not None:
            answer_ids = [*text_ids(tokenizer, assistant.strip()), tokenizer.eos_token_id]
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


def prompt_ids(tokenizer: PreTrainedTokenizerBase, turns: Turns, system: str | None, template: str) -> list[int]:
    """Token ids of a conversation in the format of `template`, for generation; none for one without turns.

    Nothing is learnt from it, so the tokenizer's own template may change earlier turns when a later one follows:
    Mistral's puts the system prompt in front of the last question.
    """
    if template == "vicuna" or not turns:
        return encode_conversation(tokenizer, turns, system, template)[0]
    check_template(tokenizer)
    call, shown, turns, system = _special_hidden(tokenizer, turns, system)
    text = shown(fill_template(tokenizer, as_messages(turns, system), opens_answer=turns[-1][1] is None))
    # with offsets: else the web page's tokenizer takes the template's special tokens for text
    return call(text, add_special_tokens=False, return_offsets_mapping=True).input_ids


def _special_hidden(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, system: str | None
) -> tuple[Callable[..., Any], Callable[[str], str], Turns, str | None]:
    """(tokenizer, what to do with filled-in templates, turns, system), so that special tokens in texts stay text.

    They are hidden while the template is filled in: all that are left are the template's own.
    """
    special = special_tokens(tokenizer)
    if not special.are_in([text for turn in [*turns, (system or "", None)] for text in turn if text]):
        return tokenizer, str, turns, system
    hidden: Turns = [(special.hide(user), answer and special.hide(answer)) for user, answer in turns]
    return special.renamed(tokenizer), special.rename, hidden, None if system is None else special.hide(system)


def encode_by_tokenizer(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, system: str | None = None
) -> tuple[list[int], list[int]]:
    """(input_ids, labels) by the tokenizer's own chat template; an answer is the text it adds.

    Raises:
        UserError: there is no template, it rejects the conversation, or it rewrites earlier turns.
    """
    check_template(tokenizer)
    call, shown, turns, system = _special_hidden(tokenizer, turns, system)
    spans, text = [], ""
    for at, (_, assistant) in enumerate(turns):
        prompt, whole = map(shown, _filled(tokenizer, turns[: at + 1], system))
        if assistant is not None:
            spans.append((len(prompt), len(whole.rstrip())))  # ChatML ends with a line break
        if not (prompt.startswith(text) and whole.startswith(prompt)):
            raise UserError(
                f"template: the chat template of {tokenizer.name_or_path or 'the tokenizer'} changes earlier turns "
                "when a later one follows, so the answers can't be located; use template: vicuna, or conversations "
                "of one turn"
            )
        text = whole
    encoded = call(text, add_special_tokens=False, return_offsets_mapping=True)
    # tokenizers that trim offsets, like Llama 3's, report a token of blanks as an empty span at its end
    labels = [
        token if any(start <= first and start < last <= end for start, end in spans) else IGNORE_INDEX
        for token, (first, last) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ]
    return encoded.input_ids, labels


def _filled(tokenizer: PreTrainedTokenizerBase, turns: Turns, system: str | None) -> tuple[str, str]:
    """The text up to where the last answer begins, and the text with it; twice the same for an answer of None."""
    question, answer = turns[-1]
    asked: Turns = [*turns[:-1], (question, None)]
    prompt = fill_template(tokenizer, as_messages(asked, system), opens_answer=True)
    if answer is None:
        return prompt, prompt
    whole = fill_template(tokenizer, as_messages(turns, system))
    if system is not None and len(turns) == 1 and not whole.startswith(prompt):
        # Mistral's template has the system prompt only where a question is the last message: what it adds for the
        # answer is seen without one
        without, answered = _filled(tokenizer, turns, None)
        whole = prompt + answered[len(without) :] if answered.startswith(without) else whole
    return prompt, whole


def answer_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the tokenizer's own chat template ends an answer; None if it has no such.

    Base models whose tokenizer has a template, such as Qwen2.5, name another end of a text.
    """
    try:
        last = next((label for label in reversed(encode_by_tokenizer(tokenizer, [("a", "b")])[1]) if label >= 0), None)
    except UserError:
        return None
    return last if last in tokenizer.added_tokens_decoder else None


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template or not tokenizer.is_fast:
        lack = "no fast version, which has offsets" if tokenizer.chat_template else "no chat template"
        raise UserError(f"template: tokenizer, but {tokenizer.name_or_path or 'it'} has {lack}; use template: vicuna")


def as_messages(turns: Sequence[tuple[str, str | None]], system: str | None = None) -> list[dict[str, str]]:
    """{"role", "content"} messages; an answer of None is left out."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        said = zip(("user", "assistant"), turn, strict=True)
        messages += [{"role": role, "content": text} for role, text in said if text is not None]
    return messages
