"""What may the user of a program that generates text set, and is it sane? The flags of inference, chat and web."""

import argparse
import importlib.util
from typing import Any

import torch

from component.error import UserError
from component.inference.context import TRUNCATIONS
from component.inference.kv_cache import CACHES

# kernels of attention, and the package that each needs
ATTENTIONS = {
    "sdpa": None,
    "eager": None,
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}


def boolean(text: str) -> bool:
    """For flags that take `True` and `False`, as the original's evaluation does, and also stand alone."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def generation_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    newest = "default: the newest finished run under output/"
    parser.add_argument(
        "--model_name_or_path", help=f"plain or merged model, or the adapter's base ({newest}, merged)"
    )
    parser.add_argument("--adapter_name_or_path", help=f"adapter folder or hub id ({newest}, if it is not merged)")
    flag: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True}
    parser.add_argument("--load_in_4bit", **flag, default=False, help="NF4 weights: a quarter of the memory")
    parser.add_argument("--context_size", type=int, help="tokens a base is stretched to; our own folders know theirs")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="tokens to generate at most (500)")
    parser.add_argument("--temperature", type=float, default=0.35, help="of sampling (0.35)")
    parser.add_argument("--top_p", type=float, default=0.9, help="share of the probability that is sampled from (0.9)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 discourages repeating (1.0)")
    parser.add_argument("--do_sample", **flag, default=True, help="false takes the likeliest token each time (true)")
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
    for name, (is_sane, cure) in bounds.items():
        if not is_sane:
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
