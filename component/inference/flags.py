"""Which flags do inference, chat and web share, are their values valid, and which model do they name?"""

import argparse
import importlib.util
import io
import logging
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from component.checkpoint import RECORD_FILE, merged_folder, newest_run
from component.cli import BOOLEAN
from component.error import UserError
from component.inference.context import TRUNCATIONS
from component.inference.kv_cache import CACHES, check_cache
from component.loading import load_for_inference

# kernels of attention, and the package that each needs
ATTENTIONS = {
    "sdpa": None,
    "eager": None,
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}


def generation_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    newest = "default: the newest finished run under output/"
    parser.add_argument(
        "--model_name_or_path", help=f"plain or merged model, or the adapter's base ({newest}, merged)"
    )
    parser.add_argument("--adapter_name_or_path", help=f"adapter folder or hub id ({newest}, if it is not merged)")
    parser.add_argument("--load_in_4bit", **BOOLEAN, help="NF4 weights: a quarter of the memory")
    parser.add_argument("--context_size", type=int, help="tokens a base is stretched to; our own folders know theirs")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="tokens to generate at most (500)")
    parser.add_argument("--temperature", type=float, default=0.35, help="of sampling (0.35)")
    parser.add_argument("--top_p", type=float, default=0.9, help="share of the probability that is sampled from (0.9)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 discourages repeating (1.0)")
    parser.add_argument("--do_sample", **BOOLEAN, help="false takes the likeliest token each time (true)")
    parser.add_argument("--seed", type=int, default=42, help="of sampling (42)")
    parser.add_argument(
        "--cache_implementation",
        choices=CACHES,
        default="dynamic",
        help="of keys and values: as computed (dynamic), in host memory, or rounded to save memory (dynamic)",
    )
    parser.add_argument("--attn_implementation", choices=ATTENTIONS, help="attention's kernel (sdpa)")
    parser.add_argument(
        "--truncate", choices=TRUNCATIONS, help="what goes of a prompt longer than the context (it is refused)"
    )
    parser.set_defaults(do_sample=True)
    return parser


def check_sampling(flags: argparse.Namespace) -> None:
    bounds = {
        "max_new_tokens": (flags.max_new_tokens >= 1, "at least 1"),
        "temperature": (flags.temperature > 0, "a number above 0; for the likeliest tokens --do_sample false"),
        "top_p": (0 < flags.top_p <= 1, "a share in (0, 1]"),
        "repetition_penalty": (flags.repetition_penalty > 0, "a number above 0, 1 for none"),
        "seed": (0 <= flags.seed < 2**32, "0 or more, below 2**32"),
        "context_size": (flags.context_size is None or flags.context_size >= 1, "at least 1 token"),
    }
    for name, (is_valid, cure) in bounds.items():
        if not is_valid:
            raise UserError(f"--{name}: {getattr(flags, name)}; use {cure}")


def check_attention(implementation: str | None) -> None:
    """Refuse, before any weight is loaded, a kernel that is not here; transformers would fetch one from the hub."""
    package = ATTENTIONS.get(implementation or "sdpa")
    if package is None:
        return
    lack = "no CUDA GPU" if not torch.cuda.is_available() else None
    lack = lack or (f"no package {package}" if importlib.util.find_spec(package) is None else None)
    if lack:
        raise UserError(f"--attn_implementation: {implementation}, but there is {lack} here; use sdpa")


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


def _is_merged(run: Path, merged: Path) -> bool:
    """Whether `merged` was made from `run` as it is now, not from an earlier training under the same name."""
    record = merged / RECORD_FILE
    if not record.is_file():
        return merged.is_dir()
    return record.stat().st_mtime >= (run / RECORD_FILE).stat().st_mtime
