"""Which flags do inference, chat and web share? Without slow imports, so that --help answers at once."""

import argparse

from component.cli import BOOLEAN, QUIET, new_parser
from component.data import TEMPLATES
from component.error import UserError

CACHES = ("dynamic", "offloaded", "fp8", "int8", "int4", "int2")  # component/inference/kv_cache.py explains them
AUTO = "auto"  # component/inference/cache_memory.py chooses one
TRUNCATIONS = ("middle", "left")
BOUNDS = {  # beyond them logits become infinite or NaN; on a GPU, drawing from those ends the program
    "max_new_tokens": (1, 10**9),
    "temperature": (0.01, 100),
    "top_p": (0.01, 1),
    "repetition_penalty": (0.1, 10),
}
ATTENTIONS = {  # attention implementation -> package that it needs
    "sdpa": None,
    "eager": None,
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}


def generation_parser(description: str | None) -> argparse.ArgumentParser:
    parser = new_parser(description)
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
    cache = "KV cache: as computed (dynamic), in CPU memory (offloaded), or quantized (default: the best that fits)"
    parser.add_argument("--cache_implementation", choices=(AUTO, *CACHES), default=AUTO, help=cache)
    budget = "GPU memory that may be used (default: all that is free)"
    parser.add_argument("--memory_budget_gib", type=float, help=budget)
    parser.add_argument("--attn_implementation", choices=ATTENTIONS, help="attention implementation (default sdpa)")
    truncate = "part to remove from a prompt longer than the context (default: such prompts are refused)"
    parser.add_argument("--truncate", choices=TRUNCATIONS, help=truncate)
    parser.add_argument("--quiet", **QUIET)
    # tokens per forward pass while a prompt is read: component/inference/load.py sets what fits
    parser.set_defaults(do_sample=True, template=None, system=None, prefill_tokens=None)
    return parser


def chat_parser(description: str | None) -> argparse.ArgumentParser:
    parser = generation_parser(description)
    template = "chat template (default: that of training, else the model's own)"
    parser.add_argument("--template", choices=TEMPLATES, help=template)
    parser.add_argument("--system", help="system prompt (default: that of the chat template)")
    return parser


def check_sampling(flags: argparse.Namespace) -> None:
    """Refuse numbers with which sampling fails, or means nothing.

    Raises:
        UserError: it names the flag and the value.
    """
    ranges = {
        name: (least <= getattr(flags, name) <= most, f"a number from {least} to {most}")
        for name, (least, most) in BOUNDS.items()
    }
    hints = {"temperature": ", or --do_sample false for greedy decoding", "repetition_penalty": "; 1 is no penalty"}
    bounds = {
        **{name: (is_valid, cure + hints.get(name, "")) for name, (is_valid, cure) in ranges.items()},
        "top_k": (flags.top_k >= 0, "0 (all tokens) or more"),
        "seed": (0 <= flags.seed < 2**32, "0 or more, below 2**32"),
        "stop": (all(flags.stop or ["x"]), "strings of at least one character"),
        "memory_budget_gib": (flags.memory_budget_gib is None or flags.memory_budget_gib > 0, "a number above 0"),
        "context_size": (flags.context_size is None or flags.context_size >= 1, "at least 1 token"),
    }
    for name, (is_valid, cure) in bounds.items():
        if not is_valid:
            raise UserError(f"--{name}: {getattr(flags, name)}; use {cure}")
