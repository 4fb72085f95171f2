"""Which flags do inference, chat and web share, and which model do they name?"""

import argparse
import importlib.util
import io
import logging
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from component.checkpoint import RECORD_FILE, merged_folder, newest_run
from component.cli import BOOLEAN, QUIET
from component.data import TEMPLATES
from component.data.chat_template import check_template
from component.error import UserError
from component.inference.context import TRUNCATIONS
from component.inference.conversation import Conversation
from component.inference.kv_cache import CACHES, check_cache
from component.loading import load_for_inference, recorded_template

ATTENTIONS = {  # attention implementation -> package that it needs
    "sdpa": None,
    "eager": None,
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}


def generation_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    newest = "the newest finished run under output/"
    merged = f"plain or merged model, or the adapter's base (default: merged model of {newest})"
    parser.add_argument("--model_name_or_path", help=merged)
    adapter = f"adapter folder or hub id (default: {newest}, if it is not merged)"
    parser.add_argument("--adapter_name_or_path", help=adapter)
    parser.add_argument("--load_in_4bit", **BOOLEAN, help="NF4 weights: a quarter of the memory")
    context = "tokens to which a plain base is scaled; LongQLoRA's own folders record theirs"
    parser.add_argument("--context_size", type=int, help=context)
    parser.add_argument("--max_new_tokens", type=int, default=500, help="tokens to generate at most (default 500)")
    parser.add_argument("--temperature", type=float, default=0.35, help="sampling temperature (default 0.35)")
    parser.add_argument("--top_p", type=float, default=0.9, help="nucleus sampling threshold (default 0.9)")
    parser.add_argument("--top_k", type=int, default=0, help="sample among so many top tokens; 0: all (default 0)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: less repetition (default 1.0)")
    parser.add_argument("--do_sample", **BOOLEAN, help="false: greedy decoding (default true)")
    stop = "end an answer before any of these strings"
    parser.add_argument("--stop", nargs="+", metavar="STRING", help=stop)
    parser.add_argument("--seed", type=int, default=42, help="seed for sampling (default 42)")
    cache = "KV cache: as computed (dynamic, the default), in CPU memory (offloaded), or quantized"
    parser.add_argument("--cache_implementation", choices=CACHES, default="dynamic", help=cache)
    parser.add_argument("--attn_implementation", choices=ATTENTIONS, help="attention implementation (default sdpa)")
    truncate = "part to remove from a prompt longer than the context (default: such prompts are refused)"
    parser.add_argument("--truncate", choices=TRUNCATIONS, help=truncate)
    parser.add_argument("--quiet", **QUIET)
    parser.set_defaults(do_sample=True, template=None, system=None)
    return parser


def chat_parser(description: str | None) -> argparse.ArgumentParser:
    parser = generation_parser(description)
    template = "chat template (default: that of training, else the model's own)"
    parser.add_argument("--template", choices=TEMPLATES, help=template)
    parser.add_argument("--system", help="system prompt (default: that of the chat template)")
    return parser


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


def check_sampling(flags: argparse.Namespace) -> None:
    bounds = {
        "max_new_tokens": (flags.max_new_tokens >= 1, "at least 1"),
        "temperature": (flags.temperature > 0, "a number above 0, or --do_sample false for greedy decoding"),
        "top_p": (0 < flags.top_p <= 1, "a number in (0, 1]"),
        "top_k": (flags.top_k >= 0, "0 (all tokens) or more"),
        "repetition_penalty": (flags.repetition_penalty > 0, "a number above 0; 1 is no penalty"),
        "seed": (0 <= flags.seed < 2**32, "0 or more, below 2**32"),
        "stop": (all(flags.stop or ["x"]), "strings of at least one character"),
        "context_size": (flags.context_size is None or flags.context_size >= 1, "at least 1 token"),
    }
    for name, (is_valid, cure) in bounds.items():
        if not is_valid:
            raise UserError(f"--{name}: {getattr(flags, name)}; use {cure}")


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
