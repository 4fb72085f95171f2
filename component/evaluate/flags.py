"""Which flags do the evaluation programs share? Without torch, so that --help is quick."""

import argparse

from component.cli import BOOLEAN

PROTOCOLS = ("longlora", "sliding")  # component/evaluate/perplexity.py defines them


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
