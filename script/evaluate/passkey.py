"""Passkey retrieval: can a model retrieve a number from a long text, by text length and depth of the number?

    python script/evaluate/passkey.py --base_model MODEL --peft_model ADAPTER --lengths 4096 8192 16384 32768 \\
        --depths 11 --trials 5 --output_json passkey.json --figure passkey.png
    python script/evaluate/passkey.py --base_model output/RUN-merged --lengths 1024 2048 4096 --load_in_4bit
    torchrun --nproc_per_node 4 script/evaluate/passkey.py ...        # prompts shared by 4 GPUs
    torchrun --nproc_per_node 4 script/evaluate/passkey.py ... --sequence_parallel_size 4     # each prompt by all 4

Every prompt has exactly the requested length (component/evaluate/passkey.py). Decoding is greedy with a KV cache. An
answer is correct if its first number is exactly the key. The same seed gives the same keys. GPUs that share a prompt
keep no cache: each pass over the text confirms as much of the expected answer as is the model's.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import BOOLEAN, QUIET, check_at_least, exit_on_user_error, new_parser, parsed_first
from component.evaluate.flags import add_model_flags


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_model_flags(parser)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="prompt lengths in tokens"
    )
    depths = "number of depths from the first line (0) to the last (1), or a list such as 0 0.25 0.5 (default 11)"
    parser.add_argument("--depths", type=float, nargs="+", default=[11.0], help=depths)
    parser.add_argument("--trials", type=int, default=5, help="prompts per length and depth (default 5)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the keys (default 42)")
    parser.add_argument("--offload_cache", **BOOLEAN, help="KV cache in CPU memory: longer prompts, slower")
    parser.add_argument("--figure", help="PNG file for the heat map")
    parser.add_argument("--quiet", **QUIET)
    return parser.parse_args()


import matplotlib

matplotlib.use("Agg")
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from component.distributed.world import is_first_process, joined_processes, results_once
from component.error import UserError, first_line
from component.evaluate.figure import draw
from component.evaluate.model_spec import (
    ModelSpec,
    describe_model,
    files_read,
    load_model_spec,
    mind_context,
    model_config,
)
from component.evaluate.passkey import KEYS, PromptMaker, Trial, accuracy, even_depths, own_settings, run_trials
from component.evaluate.split import attend_across_processes, check_split
from component.evaluate.table import grid
from component.loading import resolve_model
from component.rope import context_length
from component.storage.claim import claimed
from component.storage.result import origin, write_json
from component.tokenizer import load_tokenizer


def check_flags(flags: argparse.Namespace) -> list[float]:
    """Check the flags before a model is loaded; returns the depths."""
    if not flags.base_model and not flags.peft_model:
        raise UserError("--base_model: missing; name a model, or an adapter with --peft_model")
    check_at_least(flags, 1, "lengths", "trials", "context_size", "sequence_parallel_size")
    if flags.offload_cache and flags.sequence_parallel_size > 1:
        raise UserError("--offload_cache: GPUs that share a prompt keep no cache; leave it out")
    count = flags.depths[0]
    if len(flags.depths) == 1 and count >= 1 and count.is_integer():
        return even_depths(int(count))
    outside = [depth for depth in flags.depths if not 0 <= depth <= 1]
    if outside:
        raise UserError(f"--depths: {outside[0]:g}; use one whole number, or depths from 0 to 1")
    return sorted(set(flags.depths))


def measure(model, tokenizer, depths: list[float], flags: argparse.Namespace) -> list[Trial]:
    """The trials of all processes, with a progress bar of the first one's."""
    trials: list[Trial] = []
    settings = own_settings(flags.lengths, depths, flags.trials)
    options = {"trials": flags.trials, "seed": flags.seed, "offload_cache": flags.offload_cache}
    running = run_trials(model, tokenizer, lengths=flags.lengths, depths=depths, **options)
    disable = None if is_first_process() else True  # None: without a terminal
    with tqdm(total=len(settings), unit="prompt", disable=disable) as bar:
        try:
            for trial in running:
                trials.append(trial)
                bar.set_description(f"{trial.length} tokens")
                bar.update()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--lengths: {settings[len(trials)][0]} tokens do not fit into GPU memory ({first_line(error)}); use "
                "--load_in_4bit, --offload_cache, torchrun with --sequence_parallel_size, or shorter prompts"
            ) from error
    return sorted(results_once(trials), key=lambda trial: (trial.length, trial.depth, trial.trial))


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    depths = check_flags(flags)
    flags.lengths = sorted(set(flags.lengths))
    spec = ModelSpec(None, flags.base_model, flags.peft_model, flags.context_size)
    with joined_processes(flags.sequence_parallel_size):
        is_first = is_first_process()
        written = {"--output_json": [flags.output_json], "--figure": [flags.figure]} if is_first else {}
        with claimed(written, files_read([spec]), overwrite=flags.overwrite):
            run(spec, depths, flags)


def run(spec: ModelSpec, depths: list[float], flags: argparse.Namespace) -> None:
    source = resolve_model(flags.base_model, flags.peft_model, "base_model", "peft_model").source
    check_split(model_config(spec), flags.lengths[-1], flags.sequence_parallel_size)
    tokenizer = load_tokenizer(source, field="base_model")
    PromptMaker(tokenizer).prompt(flags.lengths[0], 0.0, str(KEYS[-1]))  # refuses too short a length before loading
    model = load_model_spec(spec, load_in_4bit=flags.load_in_4bit, dtype=flags.dtype)
    mind_context(model_config(spec), flags.lengths[-1])
    if flags.sequence_parallel_size > 1:
        attend_across_processes(model)
    setting = {"base_model": flags.base_model, "peft_model": flags.peft_model}
    setting |= {**describe_model(model, flags.load_in_4bit), "decoding": "greedy", "seed": flags.seed}
    if is_first_process():
        print("\n".join(f"{name:<14} {value}" for name, value in setting.items() if value is not None), flush=True)
    start = time.monotonic()
    trials = measure(model, tokenizer, depths, flags)
    if is_first_process():
        report(trials, setting, depths, time.monotonic() - start, tokenizer, context_length(model.config), flags)


def report(
    trials: list[Trial],
    setting: dict,
    depths: list[float],
    seconds: float,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    flags: argparse.Namespace,
) -> None:
    """Print, write and draw the results; `context`: the model's, in tokens."""
    shares = accuracy(trials, depths, flags.lengths)
    rows = [
        [f"{100 * depth:.0f} %", *(f"{100 * share:.0f} %" for share in row)]
        for depth, row in zip(depths, shares, strict=True)
    ]
    print(grid(["depth, accuracy at tokens of", *map(str, flags.lengths)], rows), flush=True)
    if flags.output_json:
        found = {"lengths": flags.lengths, "depths": depths, "trials_each": flags.trials, "accuracy": shares}
        example = PromptMaker(tokenizer).prompt(flags.lengths[0], depths[-1], trials[-1].expected)
        found |= {"seconds": round(seconds, 1), "example": tokenizer.decode(example.ids)}
        write_json(
            flags.output_json, {**setting, **found, "trials": [dataclasses.asdict(t) for t in trials], **origin()}
        )
    if flags.figure:
        draw(shares, depths, flags.lengths, context, flags.figure)


if __name__ == "__main__":
    main()
