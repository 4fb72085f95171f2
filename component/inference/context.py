"""How much of the model's context is left, and which part of a longer prompt is kept?"""

import argparse
import sys

from transformers import PreTrainedModel

from component.error import UserError
from component.inference.kv_cache import PromptCache
from component.rope import context_length

TRUNCATIONS = ("middle", "left")


def fit_prompt(
    prompt_ids: list[int], context: int, max_new_tokens: int, truncate: str | None, opening: int = 0
) -> tuple[list[int], int]:
    """The tokens of a prompt that fit, and how many were cut.

    Room is left for the answer: `max_new_tokens`, but no more than a quarter of the context.

    Args:
        context: of the model, in tokens.
        truncate: `left` keeps the opening and the end, `middle` beginning and end alike; None cuts nothing.
        opening: tokens at the start that `left` keeps too: <s>, or what a chat begins with.
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
    """A prompt cut as `--truncate` says, if it must be; the user is told how much has gone."""
    context = context_length(model.config)
    kept, cut = fit_prompt(prompt_ids, context, flags.max_new_tokens, flags.truncate, opening)
    if cut:
        where = "from the middle of" if flags.truncate == "middle" else "from the start of"
        print(f"{cut} tokens cut {where} a prompt of {len(prompt_ids)}", file=sys.stderr, flush=True)
    return kept


def free_context(model: PreTrainedModel, prompt_ids: list[int], name: str = "the prompt") -> int:
    """Tokens of the context that are left for an answer.

    Raises:
        UserError: none.
    """
    context = context_length(model.config)
    if len(prompt_ids) >= context:
        raise UserError(
            f"{name} has {len(prompt_ids)} tokens, the model's context {context}; shorten the prompt, cut it with "
            "--truncate middle or left, or use a model that was extended further"
        )
    return context - len(prompt_ids)


def describe_context(model: PreTrainedModel, used: int, cache: PromptCache | None = None) -> str:
    context = context_length(model.config)
    text = f"{used} of {context} tokens of context used ({used / context:.0%})"
    if cache is not None:
        text += f", {cache.implementation} cache {cache.bytes_held / 2**20:.1f} MiB"
    return text
