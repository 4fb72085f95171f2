"""How is one text computed by several processes? Each holds a part of its tokens: sequence parallelism.

Shapes: B rows of T tokens, P processes, m = ceil(T / P) tokens per process; the last ones may hold padding, to which
no token attends.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from component.attention.interface import NAME, has_plain_attention
from component.data import IGNORE_INDEX
from component.distributed.sequence import SequenceGroup, sequence_group
from component.error import UserError
from component.loss import TOKENS_PER_CHUNK, next_token_losses
from component.rope import depends_on_length

FIELD = "--sequence_parallel_size"


def check_split(config: PretrainedConfig, longest: int, parts: int) -> None:
    """Refuse texts of up to `longest` tokens that `parts` processes cannot share.

    Raises:
        UserError: fewer tokens than processes, or a model with other attention or positions than the split computes.
    """
    if parts == 1:
        return
    if parts > longest:
        raise UserError(f"{FIELD}: {parts} processes for {longest} tokens; use fewer")
    if depends_on_length(config, longest):
        kind = config.rope_parameters["rope_type"]
        raise UserError(f"{FIELD}: {parts}, but {kind} positions depend on the length of a whole text; set it to 1")
    if not has_plain_attention(config, longest):
        raise UserError(
            f"{FIELD}: {parts}, but {config.model_type}'s own attention (a sliding window, softcapping, sinks) over "
            f"{longest} tokens is not split over processes; set it to 1"
        )


def attend_across_processes(model: PreTrainedModel) -> None:
    """Make `model` compute the processes' parts of a text as one text; for a sequence group."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(NAME)


class _Part(NamedTuple):
    input_ids: Tensor  # (B, m)
    position_ids: Tensor  # (B, m)
    start: int  # in the text


def _part(input_ids: Tensor, sequence: SequenceGroup) -> _Part:
    size = -(-input_ids.shape[1] // sequence.size)
    padded = torch.nn.functional.pad(input_ids, (0, sequence.size * size - input_ids.shape[1]))
    start = sequence.rank * size
    positions = torch.arange(start, start + size, device=input_ids.device).expand(len(input_ids), -1)
    return _Part(padded[:, start : start + size], positions, start)


def losses_of(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """(B, T), the same on all processes of a sequence group -> losses of all tokens but the first, (B, T - 1)."""
    sequence = sequence_group()
    if sequence is None:
        return next_token_losses(model, input_ids)
    part = _part(input_ids, sequence)
    targets = _part(torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=IGNORE_INDEX), sequence).input_ids
    losses = next_token_losses(
        model, part.input_ids, TOKENS_PER_CHUNK, targets, position_ids=part.position_ids
    )  # padding has a meaningless target, 0
    return sequence.gathered_tokens(losses)[:, : input_ids.shape[1] - 1]


@torch.no_grad()
def continue_greedily(
    model: PreTrainedModel, prompt_ids: list[int], max_new_tokens: int, draft: list[int], ends: set[int]
) -> list[int]:
    """Greedy continuation of a prompt by a sequence group, without a KV cache.

    Each pass over the text confirms as many tokens of `draft` as are the model's own, and gives one more: speculative
    decoding (arXiv 2211.17192) with a fixed guess. The result does not depend on the guess.

    Args:
        draft: the expected continuation.
        ends: tokens that end it.
    """
    found: list[int] = []
    while len(found) < max_new_tokens and not (found and found[-1] in ends):
        guess = draft[len(found) :] if found == draft[: len(found)] else []
        guess = guess[: max_new_tokens - len(found) - 1]
        known = [*prompt_ids, *found]
        for place, token in enumerate(_greedy_tokens(model, [*known, *guess], len(known) - 1)):
            found.append(token)
            if token in ends or place == len(guess) or token != guess[place]:
                break
    return found


def _greedy_tokens(model: PreTrainedModel, ids: list[int], first: int) -> list[int]:
    """The most probable token after each of `ids`[first:]."""
    sequence = sequence_group()
    assert sequence is not None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    part = _part(torch.tensor([ids], device=model.get_input_embeddings().weight.device), sequence)
    hidden = base.get_decoder()(
        input_ids=part.input_ids, position_ids=part.position_ids, use_cache=False
    ).last_hidden_state
    skipped = min(max(0, first - part.start), hidden.shape[1])
    chosen = torch.zeros_like(part.input_ids)
    chosen[:, skipped:] = base.get_output_embeddings()(hidden[:, skipped:]).argmax(-1)
    return sequence.gathered_tokens(chosen)[0, first : len(ids)].tolist()
