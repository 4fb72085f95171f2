"""How is text continued? The choice of model, and one streamed generation, shared by inference, chat and web."""

import argparse
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    set_seed,
)

from component.checkpoint import RECORD_FILE, merged_folder, newest_run, read_record
from component.error import UserError
from component.inference.context import fit_prompt
from component.inference.flags import check_attention, check_sampling
from component.inference.kv_cache import PromptCache, check_cache
from component.model import load_for_inference
from component.rope import context_length


def load_from_flags(flags: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the flags name, or the newest finished run: merged if it has been, else base and adapter."""
    check_sampling(flags)
    check_attention(flags.attn_implementation)
    check_cache(flags.cache_implementation)
    model_path, adapter = flags.model_name_or_path, flags.adapter_name_or_path
    if model_path is None and adapter is None:
        run = newest_run()
        merged = merged_folder(run)
        model_path, adapter = (str(merged), None) if _is_merged(run, merged) else (None, str(run))
    print(f"model: {model_path or 'the base of'} {adapter or ''}".rstrip(), file=sys.stderr, flush=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of positions beyond the unstretched length
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # under LANG=C broken bytes would pass, and end in the tokenizer
    set_seed(flags.seed)
    model, tokenizer = load_for_inference(
        model_path, adapter, context_size=flags.context_size, load_in_4bit=flags.load_in_4bit
    )
    if flags.attn_implementation:
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        plain.set_attn_implementation(flags.attn_implementation)
    return model, tokenizer


def recorded_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """How the model was taught to chat: as the record beside its tokenizer says; Vicuna's way where there is none."""
    record = read_record(tokenizer.name_or_path) or {}
    return record.get("template") or "vicuna"


def _is_merged(run: Path, merged: Path) -> bool:
    """Whether `merged` was made from `run` as it is now, not from an earlier training under the same name."""
    record = merged / RECORD_FILE
    if not record.is_file():
        return merged.is_dir()
    return record.stat().st_mtime >= (run / RECORD_FILE).stat().st_mtime


class Stopped(KeyboardInterrupt):
    """Ctrl-C while text was generated; `text` is what had come by then."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class _Writer(TextStreamer):
    """Hands text on as soon as its words are whole, and keeps the tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.ids += value.tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.write(text)


class _Stop(StoppingCriteria):
    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.should_stop(), device=input_ids.device)  # type: ignore[return-value]


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    flags: argparse.Namespace,
    write: Callable[[str], None],
    *,
    cache: PromptCache | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> str:
    """The continuation of `prompt_ids`, handed to `write` piece by piece as it is generated.

    Args:
        cache: of the conversation; None for one that ends with this answer.
        should_stop: asked after every token.

    Raises:
        UserError: the prompt leaves no room in the model's context.
        Stopped: Ctrl-C.
    """
    room = _room(model, prompt_ids)
    cache = cache or PromptCache(model.config, flags.cache_implementation)
    writer = _Writer(tokenizer, write)
    input_ids = torch.tensor([prompt_ids], device=model.get_input_embeddings().weight.device)
    try:
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=_generation_config(tokenizer, flags, min(flags.max_new_tokens, room)),
            streamer=writer,
            past_key_values=cache.start(prompt_ids),
            stopping_criteria=StoppingCriteriaList([_Stop(should_stop)] if should_stop else []),
        )
    except KeyboardInterrupt:
        cache.forget()  # some layers may have seen a token more than others
        writer.end()
        raise Stopped(tokenizer.decode(writer.ids, skip_special_tokens=True)) from None
    cache.finish(prompt_ids + writer.ids)
    return tokenizer.decode(writer.ids, skip_special_tokens=True)


def stream_continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    flags: argparse.Namespace,
    cache: PromptCache | None = None,
) -> str:
    """Print the continuation of `prompt_ids` as it is generated, then a line break; returns it."""
    try:
        text = continue_text(
            model, tokenizer, prompt_ids, flags, lambda piece: print(piece, end="", flush=True), cache=cache
        )
    except Stopped:
        print(flush=True)
        raise
    print(flush=True)
    return text


def fitted(model: PreTrainedModel, prompt_ids: list[int], flags: argparse.Namespace, opening: int = 1) -> list[int]:
    """A prompt cut as `--truncate` says, if it must be; the user is told how much has gone."""
    context = context_length(model.config)
    kept, cut = fit_prompt(prompt_ids, context, flags.max_new_tokens, flags.truncate, opening)
    if cut:
        where = "from the middle of" if flags.truncate == "middle" else "from the start of"
        print(f"{cut} tokens cut {where} a prompt of {len(prompt_ids)}", file=sys.stderr, flush=True)
    return kept


def _room(model: PreTrainedModel, prompt_ids: list[int]) -> int:
    context = context_length(model.config)
    if len(prompt_ids) >= context:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens, the model's context {context}; shorten the prompt, cut it with "
            "--truncate middle or left, or use a model that was extended further"
        )
    return context - len(prompt_ids)


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, flags: argparse.Namespace, max_new_tokens: int
) -> GenerationConfig:
    sampling = {"temperature": flags.temperature, "top_p": flags.top_p} if flags.do_sample else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=flags.do_sample,
        repetition_penalty=flags.repetition_penalty,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )


def greedy_continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    offload_cache: bool = False,
) -> list[int]:
    """The likeliest next tokens of `prompt_ids`, without the prompt; beyond the model's context too.

    Args:
        offload_cache: keys and values of all layers but one wait in host memory.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        cache_implementation="offloaded" if offload_cache else None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    input_ids = torch.tensor([prompt_ids], device=model.get_input_embeddings().weight.device)
    output = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
    return output[0, len(prompt_ids) :].tolist()


def describe_context(model: PreTrainedModel, used: int, cache: PromptCache | None = None) -> str:
    context = context_length(model.config)
    text = f"{used} of {context} tokens of context used ({used / context:.0%})"
    if cache is not None:
        text += f", {cache.implementation} cache {cache.bytes_held / 2**20:.1f} MiB"
    return text
