"""How much of the context is left, and which part of a longer prompt is kept?"""

import argparse
import sys

from transformers import PreTrainedModel

from component.error import UserError
from component.inference.kv_cache import PromptCache
from component.rope import context_length


def fit_prompt(
    prompt_ids: list[int], context: int, max_new_tokens: int, truncate: str | None, opening: int = 0
) -> tuple[list[int], int]:
    """Truncate a prompt to the context; returns the kept tokens and the number of removed ones.

    `max_new_tokens`, at most a quarter of the context, are reserved for the answer.

    Args:
        context: the model's context length in tokens.
        truncate: `left` keeps the opening and the end, `middle` start and end in equal parts; None truncates nothing.
        opening: number of leading tokens that are always kept: <s>, or the opening of a chat.
    """
    limit = context - min(max_new_tokens, max(context // 4, 1))
    excess = len(prompt_ids) - limit
    if truncate is None or excess <= 0:
        return prompt_ids, 0
    opening = min(opening, limit)
    first = max(opening, limit // 2) if truncate == "middle" else opening
    return prompt_ids[:first] + prompt_ids[first + excess :], excess


def truncate_prompt(
    model: PreTrainedModel, prompt_ids: list[int], flags: argparse.Namespace, opening: int = 1
) -> list[int]:
    """The prompt, truncated as `--truncate` says if it is too long; prints how many tokens were removed."""
    context = context_length(model.config)
    kept, cut = fit_prompt(prompt_ids, context, flags.max_new_tokens, flags.truncate, opening)
    if cut:
        where = "from the middle of" if flags.truncate == "middle" else "from the start of"
        print(f"{cut} tokens cut {where} a prompt of {len(prompt_ids)}", file=sys.stderr, flush=True)
    return kept


def free_context(model: PreTrainedModel, prompt_ids: list[int], name: str = "the prompt") -> int:
    """Number of tokens left for the answer.

    Raises:
        UserError: the prompt fills the context.
    """
    context = context_length(model.config)
    if len(prompt_ids) >= context:
        raise UserError(
            f"{name} has {len(prompt_ids)} tokens, but the model's context is {context}; shorten the prompt, truncate "
            "it with --truncate middle or left, or use a model with a longer context"
        )
    return context - len(prompt_ids)


def describe_context(model: PreTrainedModel, used: int, cache: PromptCache | None = None) -> str:
    context = context_length(model.config)
    text = f"{used} of {context} tokens of context used ({used / context:.0%})"
    if cache is not None:
        text += f", {cache.implementation} cache {cache.nbytes / 2**20:.1f} MiB"
    return text
