"""Perplexity of one or several models, with or without adapters, over a file of token ids.

    cd script/evaluate && python evaluate.py --batch_size 1 --base_model MODEL --seq_len 8192 --context_size 8192 \\
        --sliding_window 8192 --data_path pg19-validation.bin [--peft_model ADAPTER] [--low_rank_training True]
    python script/evaluate/evaluate.py --peft_model output/RUN --seq_len 2048 4096 8192 --data_path FILE.bin
    python script/evaluate/evaluate.py --compare base=MODEL interpolated=MODEL@8192 ours=output/RUN \\
        theirs=MODEL:ADAPTER@8192 --seq_len 2048 4096 8192 --data_path FILE.bin --output_json comparison.json
    python script/evaluate/evaluate.py ... --long_ppl --evaluator MODEL --key_tokens FILE.json  # key tokens alone, too
    torchrun --nproc_per_node 4 script/evaluate/evaluate.py ...       # windows shared by 4 GPUs, the same result
    torchrun --nproc_per_node 4 script/evaluate/evaluate.py ... --sequence_parallel_size 4    # each window by all 4

Prints tables; --output_json FILE writes all results. component/evaluate/perplexity.py defines the protocols,
component/evaluate/long_ppl.py key tokens.
"""

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import BOOLEAN, QUIET, check_at_least, exit_on_user_error, new_parser, parsed_first
from component.evaluate.flags import LONG_PPL, PROTOCOLS, add_long_ppl_flags, add_model_flags


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
    add_long_ppl_flags(parser)
    parser.add_argument("--quiet", **QUIET)
    return parser.parse_args()


import torch
from transformers import PreTrainedModel

from component.data.token_file import read_index, read_tokens
from component.distributed.world import from_first, is_first_process, joined_processes
from component.error import UserError, first_line
from component.evaluate.key_tokens import KeyTokens, read_key_tokens, write_key_tokens
from component.evaluate.long_ppl import KeyTokenFinder, KeyTokenRule, find_key_tokens, known_key_tokens
from component.evaluate.model_spec import (
    ModelSpec,
    check_evaluator,
    check_model_spec,
    describe_model,
    files_read,
    hashes_of_evaluator,
    load_model_spec,
    local_tokens,
    model_config,
    parse_evaluator,
    parse_model_specs,
)
from component.evaluate.perplexity import KeyTokenSource, Perplexity, measure_perplexity, plan_windows
from component.evaluate.split import attend_across_processes, check_split
from component.evaluate.table import comparison, document_line, length_table, no_key_tokens, position_table
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
    check_long_ppl(flags)
    flags.seq_len = list(dict.fromkeys(flags.seq_len))
    flags.data_path = local_tokens(flags.data_path)
    flags.load_in_4bit = flags.load_in_4bit or flags.low_rank_training
    single_spec = ModelSpec(None, flags.base_model, flags.peft_model, flags.context_size)
    specs = parse_model_specs(flags.compare) if flags.compare else [single_spec]
    flags.evaluator = parse_evaluator(flags.evaluator, specs) if flags.evaluator else None
    return specs


def check_long_ppl(flags: argparse.Namespace) -> None:
    given = [name for name in LONG_PPL if getattr(flags, name) is not None]
    if given and not flags.long_ppl:
        raise UserError(f"--{given[0]}: {getattr(flags, given[0])} has no effect without --long_ppl; add it")
    check_at_least(flags, 1, "long_ppl_context", "long_ppl_stride")
    check_at_least(flags, 0, "long_ppl_alpha")
    for name in ("long_ppl_alpha", "long_ppl_beta"):
        if not math.isfinite(getattr(flags, name) or 0):
            raise UserError(f"--{name}: {getattr(flags, name)}; use a finite number of nats")


def load(spec: ModelSpec, flags: argparse.Namespace) -> PreTrainedModel:
    model = load_model_spec(spec, load_in_4bit=flags.load_in_4bit, dtype=flags.dtype)
    if flags.sequence_parallel_size > 1:
        attend_across_processes(model)
    return model


@contextlib.contextmanager
def explaining_out_of_memory(seq_len: int, flags: argparse.Namespace) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--seq_len: {seq_len} tokens at --batch_size {flags.batch_size} do not fit into GPU memory "
            f"({first_line(error)}); use --load_in_4bit, share each window with torchrun and "
            "--sequence_parallel_size, or reduce one of the two"
        ) from error


def strides_of(flags: argparse.Namespace) -> dict[int, int]:
    """Tokens from one window to the next, by seq_len."""
    return {seq_len: flags.sliding_window or seq_len for seq_len in flags.seq_len}


def prepare_key_tokens(specs: list[ModelSpec], flags: argparse.Namespace, kept: bool) -> KeyTokens | None:
    """The key tokens that all models are measured on; none yet if the one model is its own evaluator.

    Args:
        kept: --key_tokens exists.
    """
    if not flags.long_ppl:
        return None
    evaluator = flags.evaluator
    given = {field.name: getattr(flags, f"long_ppl_{field.name}") for field in dataclasses.fields(KeyTokenRule)}
    rule = KeyTokenRule(**{name: value for name, value in given.items() if value is not None})
    count = len(read_tokens(flags.data_path, model_config(specs[0]).vocab_size))
    strides = strides_of(flags)
    windows = {seq_len: plan_windows(count, seq_len, stride, flags.protocol) for seq_len, stride in strides.items()}
    named = None if evaluator is None else str(evaluator)
    keys = KeyTokens(named, rule, flags.protocol, flags.data_path, windows, strides)
    keys.hashes_of = hashes_of_evaluator
    keys.precision = {name: getattr(flags, name) for name in ("load_in_4bit", "dtype")}
    if kept:  # read by one process: the others' machines may lack the file
        return from_first(lambda: read_key_tokens(flags.key_tokens, keys))
    if evaluator is None and flags.compare:
        raise UserError(
            "--evaluator: missing; all models of --compare are measured on the same key tokens: name who finds them"
        )
    finding = evaluator or specs[0]
    keys.evaluator = str(finding)
    check_evaluator(finding, specs, flags.data_path, keys.longest)
    for tokens in (keys.longest, rule.context + 1):
        check_split(model_config(finding), tokens, flags.sequence_parallel_size)
    if flags.compare or keys.evaluator != str(specs[0]):
        keys.positions = find(finding, keys, flags)
        free_memory()
        keep(keys, flags)
    return keys


def find(evaluator: ModelSpec, keys: KeyTokens, flags: argparse.Namespace) -> dict[int, list[list[int]]]:
    """Load the evaluator alone, and find the key tokens of the windows of every length."""
    say(f"{'evaluator':<14} {evaluator}")
    model, found = load(evaluator, flags), {}
    tokens = read_tokens(flags.data_path, model.config.vocab_size)
    for seq_len, windows in keys.windows.items():
        with explaining_out_of_memory(seq_len, flags):
            found[seq_len] = find_key_tokens(model, tokens, windows, keys.rule, flags.batch_size)
    return found


def keep(keys: KeyTokens, flags: argparse.Namespace) -> None:
    if flags.key_tokens and is_first_process():
        write_key_tokens(flags.key_tokens, keys)


def measure(
    spec: ModelSpec, tokenizer: str, flags: argparse.Namespace, keys: KeyTokens | None
) -> tuple[dict, list[Perplexity]]:
    """Load one model and measure it at every length; returns its description and its results.

    Without positions, `keys` gets those that the model itself finds.
    """
    model = load(spec, flags)
    parts = flags.sequence_parallel_size
    tokens, index = read_tokens(flags.data_path, model.config.vocab_size), read_index(flags.data_path)
    setting = {
        "name": spec.name,
        "base_model": spec.base_model,
        "peft_model": spec.peft_model,
        "data_path": flags.data_path,
        "tokenizer": tokenizer,
        "protocol": flags.protocol,
        **describe_model(model, flags.load_in_4bit),
        **({"sequence_parallel_size": parts} if parts > 1 else {}),
        **(keys.setting() if keys else {}),
    }
    say("\n".join(f"{name:<14} {value}" for name, value in setting.items() if value is not None))
    strides, results = strides_of(flags), []
    for seq_len, stride in strides.items():  # refuses any length before the first is measured
        plan_windows(len(tokens), seq_len, stride, flags.protocol)
    for seq_len in flags.seq_len:
        source = key_token_source(model, keys, seq_len) if keys else None
        with explaining_out_of_memory(seq_len, flags):
            result = measure_perplexity(
                model,
                tokens,
                seq_len=seq_len,
                stride=strides[seq_len],
                protocol=flags.protocol,
                batch_size=flags.batch_size,
                position_buckets=flags.position_buckets,
                document_starts=index.offsets if index else None,
                key_tokens=source,
            )
        if keys and isinstance(source, KeyTokenFinder):
            keys.positions[seq_len] = source.positions()
        results.append(result)
    return setting, results


def key_token_source(model: PreTrainedModel, keys: KeyTokens, seq_len: int) -> KeyTokenSource:
    if seq_len in keys.positions:
        return known_key_tokens(keys.positions[seq_len])
    return KeyTokenFinder(model, keys.windows[seq_len], keys.rule)


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


def measure_models(specs: list[ModelSpec], flags: argparse.Namespace, kept: bool) -> None:
    tokenizers = [check_model_spec(spec, flags.data_path) for spec in specs]
    for spec in specs:
        check_split(model_config(spec), max(flags.seq_len), flags.sequence_parallel_size)
    keys = prepare_key_tokens(specs, flags, kept)
    is_finding = keys is not None and not keys.positions
    results: dict[str, list[Perplexity]] = {}
    models: list[dict[str, Any]] = []
    try:
        for spec, tokenizer in zip(specs, tokenizers, strict=True):
            setting, rows = measure(spec, tokenizer, flags, keys)
            free_memory()
            results[spec.name or "perplexity"] = rows
            models.append({**setting, "results": [dataclasses.asdict(row) for row in rows]})
            if keys and is_finding:
                keep(keys, flags)
            say(length_table(rows))
            if keys and (line := no_key_tokens(rows, keys.rule.first)):
                say(line)
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
        kept = from_first(lambda: bool(flags.key_tokens) and Path(flags.key_tokens).exists())
        written = {"--output_json": [flags.output_json], "--key_tokens": [None if kept else flags.key_tokens]}
        evaluators = [flags.evaluator] if flags.evaluator and not kept else []
        read = files_read([*specs, *evaluators], flags.data_path)
        read |= {"--key_tokens": [flags.key_tokens]} if kept else {}
        with claimed(written if is_first_process() else {}, read, overwrite=flags.overwrite):
            measure_models(specs, flags, kept)


if __name__ == "__main__":
    main()
