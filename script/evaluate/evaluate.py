"""Perplexity of a model, or of a base with an adapter, over a file of token ids.

    cd script/evaluate && python evaluate.py --batch_size 1 --base_model MODEL --seq_len 8192 --context_size 8192 \\
        --sliding_window 8192 --data_path pg19-validation.bin [--peft_model ADAPTER] [--low_rank_training True]
    python script/evaluate/evaluate.py --peft_model output/RUN --seq_len 2048 4096 8192 --data_path FILE.bin

A table for people; --output_json FILE for programs. component/perplexity.py says what the protocols measure.
"""

import argparse
import dataclasses
import json
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from component.checkpoint import library_versions
from component.error import UserError, exit_on_user_error
from component.generation import boolean
from component.model import load_for_inference
from component.perplexity import PROTOCOLS, Perplexity, measure_perplexity
from component.rope import rope_factor
from component.token_file import read_tokens


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = {"type": boolean, "nargs": "?", "const": True, "default": False}
    parser.add_argument("--base_model", help="plain or merged model, or the adapter's base (default: as it says)")
    parser.add_argument("--peft_model", help="adapter folder or hub id")
    parser.add_argument("--data_path", required=True, help=".bin file: token ids in uint16, uint32 above 65535 tokens")
    parser.add_argument("--seq_len", type=int, nargs="+", default=[8192], help="tokens per window, one or several")
    parser.add_argument("--sliding_window", type=int, help="tokens from window to window (default: seq_len)")
    parser.add_argument("--context_size", type=int, help="tokens a base is stretched to; our own folders know theirs")
    parser.add_argument("--protocol", default="longlora", choices=PROTOCOLS, help="what is averaged (longlora)")
    parser.add_argument("--batch_size", type=int, default=1, help="windows at a time")
    parser.add_argument("--load_in_4bit", **flag, help="NF4 weights: a quarter of the memory")
    parser.add_argument("--low_rank_training", **flag, help="the original's name for --load_in_4bit")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="default: fp16 on GPU, else fp32")
    parser.add_argument("--output_json", help="file for the results")
    return parser.parse_args()


def check_flags(flags: argparse.Namespace) -> None:
    """Refuse what can be told to be wrong before a model is loaded."""
    if not flags.base_model and not flags.peft_model:
        raise UserError("--base_model: missing; name a model, or an adapter with --peft_model")
    bounds = {"seq_len": (min(flags.seq_len), 2), "sliding_window": (flags.sliding_window, 1)}
    for name, (value, least) in (bounds | {"batch_size": (flags.batch_size, 1)}).items():
        if value is not None and value < least:
            raise UserError(f"--{name}: {value}; use at least {least}")
    if not Path(flags.data_path).is_file():
        raise UserError(f"--data_path: there is no file {flags.data_path}; name a .bin file of token ids")
    if flags.output_json and not Path(flags.output_json).absolute().parent.is_dir():
        raise UserError(f"--output_json: there is no folder for {flags.output_json}; make it, or name another")


def table(results: list[Perplexity]) -> str:
    lines = [f"{'seq_len':>9}{'stride':>9}{'windows':>9}{'tokens':>12}{'loss':>10}{'perplexity':>12}"]
    for r in results:
        lines.append(
            f"{r.seq_len:>9}{r.stride:>9}{r.windows:>9}{r.tokens_scored:>12,}{r.loss:>10.4f}{r.perplexity:>12.4f}"
        )
    return "\n".join(lines)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_flags(flags)
    in_4bit = flags.load_in_4bit or flags.low_rank_training
    model, _ = load_for_inference(
        flags.base_model,
        flags.peft_model,
        context_size=flags.context_size,
        load_in_4bit=in_4bit,
        dtype=getattr(torch, flags.dtype) if flags.dtype else None,
        field="base_model",
        adapter_field="peft_model",
    )
    tokens = read_tokens(flags.data_path, model.config.vocab_size)
    setting = {
        "base_model": flags.base_model,
        "peft_model": flags.peft_model,
        "data_path": flags.data_path,
        "protocol": flags.protocol,
        "weights": "nf4" if in_4bit else str(model.dtype).removeprefix("torch."),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": f"full ({model.config._attn_implementation})",
        "rope_type": model.config.rope_parameters["rope_type"],
        "rope_factor": rope_factor(model.config),
    }
    print("\n".join(f"{name:<12} {value}" for name, value in setting.items() if value is not None), flush=True)
    results = [
        measure_perplexity(
            model,
            tokens,
            seq_len=seq_len,
            stride=seq_len if flags.sliding_window is None else flags.sliding_window,
            protocol=flags.protocol,
            batch_size=flags.batch_size,
        )
        for seq_len in flags.seq_len
    ]
    print(table(results), flush=True)
    if flags.output_json:
        rows = [dataclasses.asdict(result) for result in results]
        origin = {"command": " ".join(sys.argv), "date": str(date.today()), "versions": library_versions()}
        Path(flags.output_json).write_text(json.dumps({**setting, "results": rows, **origin}, indent=2) + "\n")


if __name__ == "__main__":
    main()
