"""Perplexity of one or several models, with or without adapters, over a file of token ids.

    cd script/evaluate && python evaluate.py --batch_size 1 --base_model MODEL --seq_len 8192 --context_size 8192 \\
        --sliding_window 8192 --data_path pg19-validation.bin [--peft_model ADAPTER] [--low_rank_training True]
    python script/evaluate/evaluate.py --peft_model output/RUN --seq_len 2048 4096 8192 --data_path FILE.bin
    python script/evaluate/evaluate.py --compare base=MODEL interpolated=MODEL@8192 ours=output/RUN \\
        theirs=MODEL:ADAPTER@8192 --seq_len 2048 4096 8192 --data_path FILE.bin --output_json comparison.json
    torchrun --nproc_per_node 4 script/evaluate/evaluate.py ...       # windows shared by 4 GPUs, the same result
    torchrun --nproc_per_node 4 script/evaluate/evaluate.py ... --sequence_parallel_size 4    # each window by all 4

Prints tables; --output_json FILE writes all results. component/evaluate/perplexity.py defines the protocols.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import BOOLEAN, QUIET, check_at_least, exit_on_user_error, new_parser, parsed_first
from component.evaluate.flags import PROTOCOLS, add_model_flags


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_model_flags(parser)
    several = "several models instead: NAME=MODEL or NAME=MODEL:ADAPTER, with @TOKENS to scale a plain base"
    parser.add_argument("--compare", nargs="+", metavar="NAME=MODEL", help=several)
    data = ".bin file of token ids (uint16, or uint32 for vocabularies above 65535), or its hub id"
    parser.add_argument("--data_path", required=True, help=data)
    parser.add_argument("--seq_len", type=int, nargs="+", default=[8192], help="tokens per window (default 8192)")
    parser.add_argument("--sliding_window", type=int, help="stride in tokens (default: seq_len)")
    parser.add_argument("--protocol", default="longlora", choices=PROTOCOLS, help="default longlora")
    parser.add_argument("--position_buckets", type=int, default=16, help="buckets by position; 0: none (default 16)")
    parser.add_argument("--batch_size", type=int, default=1, help="windows at a time (default 1)")
    parser.add_argument("--low_rank_training", **BOOLEAN, help="the original's name for --load_in_4bit")
    parser.add_argument("--quiet", **QUIET)
    return parser.parse_args()


import torch

from component.data.token_file import read_index, read_tokens
from component.distributed.world import is_first_process, joined_processes
from component.error import UserError, first_line
from component.evaluate.model_spec import (
    ModelSpec,
    check_model_spec,
    describe_model,
    files_read,
    load_model_spec,
    local_tokens,
    model_config,
    parse_model_specs,
)
from component.evaluate.perplexity import Perplexity, measure_perplexity, plan_windows
from component.evaluate.split import attend_across_processes, check_split
from component.evaluate.table import comparison, document_line, length_table, position_table
from component.loading import free_memory
from component.storage.claim import claimed
from component.storage.result import origin, write_json


def check_flags(flags: argparse.Namespace) -> list[ModelSpec]:
    """Check the flags before a model is loaded; returns the models to measure."""
    single = [name for name in ("base_model", "peft_model", "context_size") if getattr(flags, name)]
    if flags.compare and single:
        raise UserError(
            f"--{single[0]}: {getattr(flags, single[0])} beside --compare; name it there, or leave one of them out"
        )
    if not flags.compare and not flags.base_model and not flags.peft_model:
        raise UserError("--base_model: missing; name a model, an adapter with --peft_model, or several with --compare")
    check_at_least(flags, 2, "seq_len")
    check_at_least(flags, 1, "sliding_window", "batch_size", "context_size", "sequence_parallel_size")
    check_at_least(flags, 0, "position_buckets")
    flags.data_path = local_tokens(flags.data_path)
    if flags.compare:
        return parse_model_specs(flags.compare)
    return [ModelSpec(None, flags.base_model, flags.peft_model, flags.context_size)]


def measure(spec: ModelSpec, tokenizer: str, flags: argparse.Namespace) -> tuple[dict, list[Perplexity]]:
    """Load one model and measure it at every length; returns its description and its results."""
    in_4bit = flags.load_in_4bit or flags.low_rank_training
    model = load_model_spec(spec, load_in_4bit=in_4bit, dtype=flags.dtype)
    parts = flags.sequence_parallel_size
    if parts > 1:
        attend_across_processes(model)
    tokens, index = read_tokens(flags.data_path, model.config.vocab_size), read_index(flags.data_path)
    setting = {
        "name": spec.name,
        "base_model": spec.base_model,
        "peft_model": spec.peft_model,
        "data_path": flags.data_path,
        "tokenizer": tokenizer,
        "protocol": flags.protocol,
        **describe_model(model, in_4bit),
        **({"sequence_parallel_size": parts} if parts > 1 else {}),
    }
    say("\n".join(f"{name:<14} {value}" for name, value in setting.items() if value is not None))
    strides = [flags.sliding_window or seq_len for seq_len in flags.seq_len]
    for seq_len, stride in zip(flags.seq_len, strides, strict=True):  # refuses any length before the first is measured
        plan_windows(len(tokens), seq_len, stride, flags.protocol)
    results = []
    for seq_len, stride in zip(flags.seq_len, strides, strict=True):
        try:
            result = measure_perplexity(
                model,
                tokens,
                seq_len=seq_len,
                stride=stride,
                protocol=flags.protocol,
                batch_size=flags.batch_size,
                position_buckets=flags.position_buckets,
                document_starts=index.offsets if index else None,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--seq_len: {seq_len} tokens at --batch_size {flags.batch_size} do not fit into GPU memory "
                f"({first_line(error)}); use --load_in_4bit, share each window with torchrun and "
                "--sequence_parallel_size, or reduce one of the two"
            ) from error
        results.append(result)
    return setting, results


def say(text: str) -> None:
    if is_first_process():
        print(text, flush=True)


def show(results: dict[str, list[Perplexity]], flags: argparse.Namespace) -> None:
    """Print the tables over all models."""
    if flags.compare:
        say("\n" + comparison(results))
    if flags.position_buckets:
        say("\n" + position_table(results))
    for name, row in results.items():
        longest = max(row, key=lambda result: result.seq_len)
        if longest.by_document:
            say("\n" + document_line(name, longest.by_document))


def measure_models(specs: list[ModelSpec], flags: argparse.Namespace) -> None:
    tokenizers = [check_model_spec(spec, flags.data_path) for spec in specs]
    for spec in specs:
        check_split(model_config(spec), max(flags.seq_len), flags.sequence_parallel_size)
    results: dict[str, list[Perplexity]] = {}
    models: list[dict[str, Any]] = []
    try:
        for spec, tokenizer in zip(specs, tokenizers, strict=True):
            setting, rows = measure(spec, tokenizer, flags)
            free_memory()
            results[spec.name or "perplexity"] = rows
            models.append({**setting, "results": [dataclasses.asdict(row) for row in rows]})
            say(length_table(rows))
        show(results, flags)
    finally:  # a closed pipe loses tables, not the measurement
        if flags.output_json and is_first_process() and len(models) == len(specs):
            shared = {"data_path": flags.data_path, "protocol": flags.protocol, "models": models}
            single = {name: value for name, value in models[0].items() if name != "name"}
            write_json(flags.output_json, {**(shared if flags.compare else single), **origin()})


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    specs = check_flags(flags)
    with joined_processes(flags.sequence_parallel_size):
        written = {"--output_json": [flags.output_json if is_first_process() else None]}
        with claimed(written, files_read(specs, flags.data_path), overwrite=flags.overwrite):
            measure_models(specs, flags)


if __name__ == "__main__":
    main()
