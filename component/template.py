"""How is a chat prompt spelt? The one home of the template, used by training and by chat.

The spelling is the original project's: Vicuna's, with line breaks and without a beginning-of-sequence token, so that
its published adapters see what they were trained on. An answer ends with the tokenizer's end-of-sequence token.
"""

from transformers import PreTrainedTokenizerBase

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IGNORE_INDEX = -100  # torch's cross-entropy leaves out labels of this value


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str | None]]
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their labels.

    Args:
        turns: (user, assistant) texts in order; None as the last answer leaves the prompt open for the model.

    Returns:
        (input_ids, labels) of equal length; labels are the ids in the answers and their end-of-sequence tokens, and
        IGNORE_INDEX elsewhere.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for turn, (user, assistant) in enumerate(turns):
        opening = f"{SYSTEM}\n" if turn == 0 else "\n"
        prompt_ids = tokenizer(f"{opening}USER: {user.strip()}\nASSISTANT: ", add_special_tokens=False).input_ids
        input_ids += prompt_ids
        labels += [IGNORE_INDEX] * len(prompt_ids)
        if assistant is not None:
            answer_ids = [*tokenizer(assistant.strip(), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            input_ids += answer_ids
            labels += answer_ids
    return input_ids, labels
