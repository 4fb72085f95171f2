"""Which model do the flags of inference, chat and web name, and how is it loaded?"""

import argparse
import importlib.util
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from component.checkpoint import RECORD_FILE, merged_folder, newest_run
from component.data.chat_template import answer_end, check_template
from component.data.text import text_ids
from component.error import UserError
from component.inference.block_attention import NAME, supports_blocks
from component.inference.cache_memory import (
    CHUNKS,
    Reading,
    available_memory,
    best_chunk,
    choose_cache,
    choose_for_context,
    describe_choice,
)
from component.inference.conversation import Conversation
from component.inference.flags import ATTENTIONS, AUTO, check_sampling
from component.inference.kv_cache import check_cache, check_quantizable
from component.loading import (
    default_device,
    end_ids,
    inference_config,
    inference_dtype,
    load_for_inference,
    recorded_template,
    resolve_model,
)
from component.memory.budget import limit_memory
from component.model import stored_quantization
from component.rope import context_length
from component.tokenizer import load_tokenizer


def check_attention(implementation: str | None) -> None:
    """Refuse, before any weight is loaded, a missing kernel: transformers would download one from the hub."""
    package = ATTENTIONS.get(implementation or "sdpa")
    if package is None:
        return
    missing = "no CUDA GPU" if not torch.cuda.is_available() else None
    missing = missing or (f"no package {package}" if importlib.util.find_spec(package) is None else None)
    if missing:
        raise UserError(f"--attn_implementation: {implementation}, but there is {missing} here; use sdpa")


def attention_from_flags(flags: argparse.Namespace) -> str | None:
    """SDPA means the same kernels part by part, where that computes the model's attention; else what the flag says."""
    config = inference_config(*named_model(flags), context_size=flags.context_size)
    is_sdpa = flags.attn_implementation in (None, "sdpa")
    return NAME if is_sdpa and supports_blocks(config, context_length(config)) else flags.attn_implementation


def fit_cache(flags: argparse.Namespace, tokens: int | None = None, rows: int = 1) -> None:
    """Set the cache that `--cache_implementation auto` means here, and `prefill_tokens`; prints which cache it is.

    Args:
        tokens: the longest text, answer included; None for the model's whole context, or as much of it as fits.
        rows: texts that are answered at once.

    Raises:
        UserError: no cache fits, or flags that are wrong or not supported here.
    """
    check_sampling(flags)
    check_attention(flags.attn_implementation)
    check_cache(flags.cache_implementation)
    limit_memory(flags.memory_budget_gib, "--memory_budget_gib")
    config = inference_config(*named_model(flags), context_size=flags.context_size)
    check_quantizable(config, flags.cache_implementation)
    context = context_length(config)
    device = default_device()
    stored = flags.load_in_4bit or stored_quantization(resolve_model(*named_model(flags)).base) is not None
    reading = Reading(
        config, bool(stored), inference_dtype(device).itemsize, rows, flags.attn_implementation or "sdpa"
    )
    available, host = available_memory(device)
    longest = min(tokens or context, context)
    if flags.cache_implementation == AUTO:
        if tokens is None:
            chosen, longest = choose_for_context(reading, available, host)
        else:
            chosen = choose_cache(reading, longest, available, host)
        flags.cache_implementation = chosen.cache_name
        print(describe_choice(chosen, longest, context if tokens is None else longest), file=sys.stderr, flush=True)
    # a cache that was named is tried even if the longest text would not fit: others may be shorter
    found = best_chunk(reading, flags.cache_implementation, longest, available, host)
    chunk = found.chunk if found else CHUNKS[-1]
    flags.prefill_tokens = chunk if chunk in CHUNKS else CHUNKS[0]  # else prompts are read at once, whatever it says


def fit_cache_to(flags: argparse.Namespace, prompts: Sequence[str], rows: int = 1) -> None:
    """`fit_cache` for these prompts and their answers."""
    tokenizer = load_tokenizer(resolve_model(*named_model(flags)).source)
    longest = max(len(text_ids(tokenizer, prompt, add_special_tokens=True)) for prompt in prompts)
    fit_cache(flags, longest + flags.max_new_tokens, rows)


def load_from_flags(flags: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the flags name; by default the newest finished run's merged model, or its base and adapter."""
    if flags.prefill_tokens is None:
        fit_cache(flags)
    model_path, adapter = named_model(flags)
    print(f"model: {model_path or 'the base of'} {adapter or ''}".rstrip(), file=sys.stderr, flush=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # warns about positions beyond the base's length
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # under LANG=C, invalid bytes would reach the tokenizer
    set_seed(flags.seed)
    model, tokenizer = load_for_inference(
        model_path,
        adapter,
        context_size=flags.context_size,
        load_in_4bit=flags.load_in_4bit,
        attention=attention_from_flags(flags),
    )
    if recorded_template(tokenizer) == "tokenizer":
        stop_after_answer(model, tokenizer)
    return model, tokenizer


def stop_after_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generation end at the token with which the tokenizer's own chat template ends an answer, too."""
    end = answer_end(tokenizer)
    if end is not None:
        model.generation_config.eos_token_id = sorted({*end_ids(model), end})


def named_model(flags: argparse.Namespace) -> tuple[str | None, str | None]:
    """(model, adapter) that the flags name; by default those of the newest finished run."""
    if flags.model_name_or_path is not None or flags.adapter_name_or_path is not None:
        return flags.model_name_or_path, flags.adapter_name_or_path
    run = newest_run()
    merged = merged_folder(run)
    return (str(merged), None) if _is_merged(run, merged) else (None, str(run))


def _is_merged(run: Path, merged: Path) -> bool:
    """Whether `merged` was made from this `run`, not from an earlier run of the same name."""
    record = merged / RECORD_FILE
    if not record.is_file():
        return merged.is_dir()
    return record.stat().st_mtime >= (run / RECORD_FILE).stat().st_mtime


def new_conversation(tokenizer: PreTrainedTokenizerBase, flags: argparse.Namespace) -> Conversation:
    """An empty conversation in the template and with the system prompt that the flags name.

    Raises:
        UserError: the tokenizer has no such template, or its template takes no system prompt.
    """
    template = flags.template or recorded_template(tokenizer)
    if template == "tokenizer":
        check_template(tokenizer)
    conversation = Conversation(tokenizer, template)
    if flags.system is not None:
        conversation.set_system(flags.system)
    return conversation
