"""How is text generated? Streamed for inference, chat and web; greedily for evaluation."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from component.error import UserError
from component.inference.context import free_context
from component.inference.kv_cache import CHUNK, PromptCache
from component.inference.stop import StopWriter, before_stop, has_stop, special_stops
from component.loading import end_ids


class Stopped(KeyboardInterrupt):
    """Ctrl-C during generation; `text` was generated until then."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class _Writer(TextStreamer):
    """Streams text word by word to `write`, up to a stop string, and records the token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None], stops: Sequence[str]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = StopWriter(write, stops)
        self.stops = stops
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.ids += value.tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write.put(text, stream_end)

    def has_stop(self) -> bool:
        return has_stop(self.tokenizer, self.ids, self.stops)

    def text(self) -> str:
        return answer_text(self.tokenizer, self.ids, self.stops)


class _Stop(StoppingCriteria):
    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.should_stop(), device=input_ids.device)  # type: ignore[return-value]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    flags: argparse.Namespace,
    write: Callable[[str], None],
    *,
    cache: PromptCache | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> str:
    """Generate a continuation of `prompt_ids` and return it; `write` gets it piece by piece.

    Args:
        cache: the conversation's KV cache; None for a new one.
        should_stop: called after every token.

    Raises:
        UserError: the prompt fills the model's context.
        Stopped: Ctrl-C.
    """
    check_prompt(model, tokenizer, prompt_ids)
    max_new_tokens = min(flags.max_new_tokens, free_context(model, prompt_ids))
    # top_k 0 is off: transformers would fill in 50
    sampling = (
        {"temperature": flags.temperature, "top_p": flags.top_p, "top_k": flags.top_k} if flags.do_sample else {}
    )
    sampling |= {"do_sample": flags.do_sample, "repetition_penalty": flags.repetition_penalty}
    cache = cache or cache_from_flags(model, flags)
    stops = flags.stop or ()
    writer = _Writer(tokenizer, write, stops)
    checks = [check for check in (should_stop, writer.has_stop if stops else None) if check]
    input_ids = torch.tensor([prompt_ids], device=model.get_input_embeddings().weight.device)
    past = cache.start(prompt_ids)
    try:
        prefill(model, input_ids, past, cache.chunk)
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=generation_config(model, tokenizer, max_new_tokens, stops, **sampling),
            streamer=writer,
            past_key_values=past,
            stopping_criteria=StoppingCriteriaList(map(_Stop, checks)),
        )
    except KeyboardInterrupt:
        cache.forget()  # in an interrupted forward pass, some layers have cached a token more than others
        writer.end()
        raise Stopped(writer.text()) from None
    cache.finish(prompt_ids + writer.ids)
    return writer.text()


def cache_from_flags(model: PreTrainedModel, flags: argparse.Namespace) -> PromptCache:
    """An empty cache, as `component.inference.load.fit_cache` set the flags."""
    return PromptCache(model.config, flags.cache_implementation, flags.prefill_tokens or CHUNK)


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: torch.Tensor, past: Any, chunk: int) -> None:
    """Read `input_ids` (B, T) into a cache in forward passes of `chunk` tokens, but for the last one.

    `generate` does that one, of 1 to `chunk` tokens, which predicts the first new token.
    """
    at = past.get_seq_length()
    while input_ids.shape[1] - at > chunk:
        model.get_decoder()(input_ids=input_ids[:, at : at + chunk], past_key_values=past, use_cache=True)
        at += chunk


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Sequence[str]) -> str:
    """The text of generated tokens, up to the first stop string."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    kept = before_stop(text, stops)
    return text if kept is None else kept


def stream_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    flags: argparse.Namespace,
    cache: PromptCache | None = None,
) -> str:
    """Print a continuation of `prompt_ids` as it is generated, then a line break; returns it."""
    try:
        text = generate(model, tokenizer, prompt_ids, flags, partial(print, end="", flush=True), cache=cache)
    except Stopped:
        print(flush=True)
        raise
    print(flush=True)
    return text


def check_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]) -> None:
    """Refuse a prompt with a token that the model has no embedding for.

    Raises:
        UserError: it has one.
    """
    rows, largest = model.get_input_embeddings().weight.shape[0], max(prompt_ids, default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"the prompt has token {largest} ({token}), beyond the model's {rows} embedding rows; use the tokenizer "
            "that belongs to the model, or leave that token out"
        )


def generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    **options: Any,
) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, *end_ids(model), *special_stops(tokenizer, stops)}),
        pad_token_id=tokenizer.eos_token_id,
        **options,
    )


def generate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    offload_cache: bool = False,
) -> list[int]:
    """Greedy continuation of `prompt_ids`, without the prompt; may exceed the model's context.

    Args:
        offload_cache: keep the KV cache of all layers but one in CPU memory.
    """
    cache = "offloaded" if offload_cache else None
    options: dict[str, Any] = {"do_sample": False, "use_cache": True, "cache_implementation": cache}
    check_prompt(model, tokenizer, prompt_ids)
    config = generation_config(model, tokenizer, max_new_tokens, **options)
    input_ids = torch.tensor([prompt_ids], device=model.get_input_embeddings().weight.device)
    output = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
    return output[0, len(prompt_ids) :].tolist()
