"""Which flags do the evaluation programs share? Without torch, so that --help is quick."""

import argparse

from component.cli import BOOLEAN

PROTOCOLS = ("longlora", "sliding")  # component/evaluate/perplexity.py defines them


LONG_PPL = ("evaluator", "key_tokens", "long_ppl_context", "long_ppl_stride", "long_ppl_alpha", "long_ppl_beta")


def add_long_ppl_flags(parser: argparse.ArgumentParser) -> None:
    """The flags about LongPPL; all of LONG_PPL need --long_ppl. component/evaluate/long_ppl.py has the defaults."""
    parser.add_argument("--long_ppl", **BOOLEAN, help="also the perplexity of key tokens alone: LongPPL")
    evaluator = "finds key tokens: a NAME of --compare, or MODEL[:ADAPTER][@TOKENS] (default: the measured model)"
    parser.add_argument("--evaluator", metavar="MODEL", help=evaluator)
    kept = "file of key tokens: written if it does not exist, else read in place of looking for them"
    parser.add_argument("--key_tokens", metavar="FILE", help=kept)
    parser.add_argument("--long_ppl_context", type=int, help="tokens of the short context (default 4096)")
    parser.add_argument("--long_ppl_stride", type=int, help="tokens that share a short context (default 1024)")
    gain = "a key token's log-likelihood is higher by more than this with the whole context (default 2)"
    parser.add_argument("--long_ppl_alpha", type=float, metavar="NATS", help=gain)
    least = "and then above this (default -2)"
    parser.add_argument("--long_ppl_beta", type=float, metavar="NATS", help=least)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags about models that the evaluation programs share."""
    base = "plain or merged model, or the adapter's base (default: the one that the adapter records)"
    parser.add_argument("--base_model", help=base)
    parser.add_argument("--peft_model", help="adapter folder or hub id")
    context = "tokens to which a plain base is scaled; LongQLoRA's own folders record theirs"
    parser.add_argument("--context_size", type=int, help=context)
    parser.add_argument("--load_in_4bit", **BOOLEAN, help="NF4 weights: a quarter of the memory")
    split = "processes, and GPUs, that share a text, under torchrun: for texts too long for one (default 1)"
    parser.add_argument("--sequence_parallel_size", type=int, default=1, help=split)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="default: fp16 on GPU, else fp32")
    parser.add_argument("--output_json", help="file for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
