"""Passkey retrieval: can a model retrieve a number from a long text, by text length and depth of the number?

    python script/evaluate/passkey.py --base_model MODEL --peft_model ADAPTER --lengths 4096 8192 16384 32768 \\
        --depths 11 --trials 5 --output_json passkey.json --figure passkey.png
    python script/evaluate/passkey.py --base_model output/RUN-merged --lengths 1024 2048 4096 --load_in_4bit

Every prompt has exactly the requested length (component/evaluate/passkey.py). Decoding is greedy with a KV cache. An
answer is correct if its first number is exactly the key. The same seed gives the same keys.
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

from component.error import UserError, first_line
from component.evaluate.figure import draw
from component.evaluate.model_spec import ModelSpec, describe_model, files_read, load_model_spec
from component.evaluate.passkey import KEYS, PromptMaker, Trial, accuracy, even_depths, run_trials
from component.evaluate.table import grid
from component.loading import extended_config_of, resolve_model
from component.rope import context_length
from component.storage.claim import claimed
from component.storage.result import origin, write_json
from component.tokenizer import load_tokenizer


def check_flags(flags: argparse.Namespace) -> list[float]:
    """Check the flags before a model is loaded; returns the depths."""
    if not flags.base_model and not flags.peft_model:
        raise UserError("--base_model: missing; name a model, or an adapter with --peft_model")
    check_at_least(flags, 1, "lengths", "trials", "context_size")
    count = flags.depths[0]
    if len(flags.depths) == 1 and count >= 1 and count.is_integer():
        return even_depths(int(count))
    outside = [depth for depth in flags.depths if not 0 <= depth <= 1]
    if outside:
        raise UserError(f"--depths: {outside[0]:g}; use one whole number, or depths from 0 to 1")
    return sorted(set(flags.depths))


def measure(model, tokenizer, depths: list[float], flags: argparse.Namespace) -> list[Trial]:
    """All trials, with a progress bar."""
    trials = []
    options = {"trials": flags.trials, "seed": flags.seed, "offload_cache": flags.offload_cache}
    running = run_trials(model, tokenizer, lengths=flags.lengths, depths=depths, **options)
    with tqdm(total=len(flags.lengths) * len(depths) * flags.trials, unit="prompt", disable=None) as bar:
        try:
            for trial in running:
                trials.append(trial)
                bar.set_description(f"{trial.length} tokens")
                bar.update()
        except torch.OutOfMemoryError as error:
            length = flags.lengths[len(trials) // (len(depths) * flags.trials)]
            raise UserError(
                f"--lengths: {length} tokens do not fit into GPU memory ({first_line(error)}); "
                "use --load_in_4bit, --offload_cache, or shorter prompts"
            ) from error
    return trials


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    depths = check_flags(flags)
    flags.lengths = sorted(set(flags.lengths))
    spec = ModelSpec(None, flags.base_model, flags.peft_model, flags.context_size)
    written = {"--output_json": [flags.output_json], "--figure": [flags.figure]}
    with claimed(written, files_read([spec]), overwrite=flags.overwrite):
        run(spec, depths, flags)


def run(spec: ModelSpec, depths: list[float], flags: argparse.Namespace) -> None:
    _, source, is_ours, _ = resolve_model(flags.base_model, flags.peft_model, "base_model", "peft_model")
    extended_config_of(source, flags.context_size, is_fixed=is_ours, field="base_model")
    tokenizer = load_tokenizer(source, field="base_model")
    PromptMaker(tokenizer).prompt(flags.lengths[0], 0.0, str(KEYS[-1]))  # refuses too short a length before loading
    model = load_model_spec(spec, load_in_4bit=flags.load_in_4bit, dtype=flags.dtype)
    setting = {"base_model": flags.base_model, "peft_model": flags.peft_model}
    setting |= {**describe_model(model, flags.load_in_4bit), "decoding": "greedy", "seed": flags.seed}
    print("\n".join(f"{name:<14} {value}" for name, value in setting.items() if value is not None), flush=True)
    start = time.monotonic()
    trials = measure(model, tokenizer, depths, flags)
    shares = accuracy(trials, depths, flags.lengths)
    rows = [
        [f"{100 * depth:.0f} %", *(f"{100 * share:.0f} %" for share in row)]
        for depth, row in zip(depths, shares, strict=True)
    ]
    print(grid(["depth, accuracy at tokens of", *map(str, flags.lengths)], rows), flush=True)
    if flags.output_json:
        found = {"lengths": flags.lengths, "depths": depths, "trials_each": flags.trials, "accuracy": shares}
        example = PromptMaker(tokenizer).prompt(flags.lengths[0], depths[-1], trials[-1].expected)
        found |= {"seconds": round(time.monotonic() - start, 1), "example": tokenizer.decode(example.ids)}
        write_json(
            flags.output_json, {**setting, **found, "trials": [dataclasses.asdict(t) for t in trials], **origin()}
        )
    if flags.figure:
        draw(shares, depths, flags.lengths, context_length(model.config), flags.figure)


if __name__ == "__main__":
    main()
