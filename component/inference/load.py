"""Which model do the flags of inference, chat and web name, and how is it loaded?"""

import argparse
import importlib.util
import io
import logging
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from component.checkpoint import RECORD_FILE, merged_folder, newest_run
from component.data.chat_template import check_template
from component.error import UserError
from component.inference.conversation import Conversation
from component.inference.flags import ATTENTIONS, check_sampling
from component.inference.kv_cache import check_cache
from component.loading import load_for_inference, recorded_template


def check_attention(implementation: str | None) -> None:
    """Refuse, before any weight is loaded, a missing kernel: transformers would download one from the hub."""
    package = ATTENTIONS.get(implementation or "sdpa")
    if package is None:
        return
    missing = "no CUDA GPU" if not torch.cuda.is_available() else None
    missing = missing or (f"no package {package}" if importlib.util.find_spec(package) is None else None)
    if missing:
        raise UserError(f"--attn_implementation: {implementation}, but there is {missing} here; use sdpa")


def load_from_flags(flags: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the flags name; by default the newest finished run's merged model, or its base and adapter."""
    check_sampling(flags)
    check_attention(flags.attn_implementation)
    check_cache(flags.cache_implementation)
    model_path, adapter = named_model(flags)
    print(f"model: {model_path or 'the base of'} {adapter or ''}".rstrip(), file=sys.stderr, flush=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # warns about positions beyond the base's length
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # under LANG=C, invalid bytes would reach the tokenizer
    set_seed(flags.seed)
    return load_for_inference(
        model_path,
        adapter,
        context_size=flags.context_size,
        load_in_4bit=flags.load_in_4bit,
        attention=flags.attn_implementation,
    )


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
