"""Up to which length do the base and LongQLoRA retrieve passkeys, each after a short tuning on the task?

    python script/experiment/downstream/passkey.py --base output/experiment/base --work output/experiment/passkey \\
        --adapter output/experiment/runs/yarn-last-8192-0 \\
        --output_json figure/experiment_passkey.json --figure figure/experiment_passkey.png
    python script/experiment/downstream/passkey.py --base BASE --work DIR ... --context 4096     # without an adapter

Compares three models: the base, tuned at its own length with full attention; the same with positions scaled afterwards
and no further training; and the adapter, merged and tuned at its extended length with S2-Attn and full attention in
the last steps. Both tunings use the same number of steps, tokens per step and rank. They train on prompts of
component/evaluate/passkey.py with random length (log-uniform) and depth, tokenized exactly as
script/evaluate/passkey.py does, and never on a key that is measured.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from component.cli import exit_on_user_error, new_parser, parsed_first

LENGTHS = [256, 512, 1024, 2048, 4096, 8192]


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base of script/experiment/pretrain.py")
    parser.add_argument("--adapter", type=Path, help="LongQLoRA adapter (default: none, the base is extended)")
    parser.add_argument("--context", type=int, help="tokens to extend to without --adapter (8192)")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and logs")
    parser.add_argument("--steps", type=int, default=600, help="of each tuning (600)")
    parser.add_argument("--tokens_per_step", type=int, default=16384, help="in packed samples (16384)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="(1e-3)")
    parser.add_argument("--rank", type=int, default=64, help="LoRA rank and alpha (64)")
    parser.add_argument("--group_size_ratio", type=float, default=0.25, help="in LongQLoRA's tuning (0.25)")
    parser.add_argument("--full_attention_ratio", type=float, default=0.1, help="in LongQLoRA's tuning (0.1)")
    parser.add_argument("--full_attention", action="store_true", help="tune LongQLoRA without S2-Attn, too")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help=f"tokens ({LENGTHS[0]} ... {LENGTHS[-1]})"
    )
    parser.add_argument("--depths", type=int, default=9, help="evenly spaced depths (9)")
    parser.add_argument("--trials", type=int, default=5, help="prompts per length and depth (5)")
    parser.add_argument("--seed", type=int, default=42, help="of the measured prompts; training uses other keys (42)")
    parser.add_argument("--jobs", type=int, default=1, help="models tuned and measured at a time (1)")
    parser.add_argument("--output_json", required=True, help="file for the results")
    parser.add_argument("--figure", required=True, help="PNG file for the heat maps")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args()


import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from component.checkpoint import read_record
from component.data.chat_template import as_messages
from component.error import UserError
from component.evaluate.figure import colour_bar, heat_map
from component.evaluate.passkey import KEYS, PromptMaker, draw_key, even_depths
from component.model import load_config
from component.rope import context_length
from component.storage.result import origin, save_figure, write_json
from component.tokenizer import UNLIMITED, load_tokenizer
from script.experiment.downstream.passkey_samples import training_samples, with_plain_template
from script.experiment.downstream.tuning import check_flags, held, measured, merge, tune


def check(flags: argparse.Namespace) -> None:
    counts = ("steps", "tokens_per_step", "rank", "depths", "trials", "jobs")
    check_flags(flags, counts=counts, folders=("base", "work", "adapter"))
    if flags.adapter and flags.context:
        raise UserError(f"--context: {flags.context}; leave it out, the adapter {flags.adapter} has its own")


def write_samples(model: Path, file: Path, longest: int, flags: argparse.Namespace) -> dict[str, int]:
    """Write the samples of one tuning, one epoch, for train.py. Returns their number and longest length."""
    tokenizer = load_tokenizer(str(model), UNLIMITED)
    settings = product(flags.lengths, even_depths(flags.depths), range(flags.trials))
    banned = {draw_key(flags.seed, *setting) for setting in settings}
    tokens, samples = flags.steps * flags.tokens_per_step, 0
    with file.open("w", encoding="utf-8") as out:
        for turns in training_samples(tokenizer, tokens, longest, banned, flags.seed):
            out.write(json.dumps({"messages": as_messages(turns)}) + "\n")
            samples += 1
    return {"samples": samples, "longest_tokens": longest}


def tune_retrieval(
    name: str, model: Path, context: int, attention: dict[str, Any], flags: argparse.Namespace
) -> dict[str, Any]:
    """Tune `model` on passkey retrieval at `context` tokens, in WORK/NAME."""
    model = with_plain_template(model, flags.work / f"{name}-base")
    file = flags.work / f"{name}.jsonl"
    data = write_samples(model, file, context, flags)
    rows = max(1, flags.tokens_per_step // context)
    run = tune(
        flags.work / name,
        model_name_or_path=str(model),
        train_file=str(file),
        template="tokenizer",
        packing=True,
        max_seq_length=context,
        model_max_length=context,
        per_device_train_batch_size=rows,
        max_steps=flags.steps,
        learning_rate=flags.learning_rate,
        lora_rank=flags.rank,
        lora_alpha=flags.rank,
        seed=flags.seed,
        **attention,
    )
    return {"data": data, **run}


def measure(name: str, words: list[str], flags: argparse.Namespace) -> dict[str, Any]:
    settings = {"depths": [flags.depths], "trials": [flags.trials], "seed": [flags.seed], "lengths": flags.lengths}
    words = words + [word for key, values in settings.items() for word in (f"--{key}", *map(str, values))]
    return measured("script/evaluate/passkey.py", words, flags.work / f"{name}-measured.json")


def draw(results: dict[str, dict[str, Any]], file: str) -> None:
    """Heat maps of all models, side by side."""
    count = len(results)
    figure, panels = plt.subplots(1, count, figsize=(0.8 + 4.4 * count, 4.6), layout="constrained", sharey=True)
    for axes, (label, result) in zip(panels, results.items(), strict=True):
        measured = (result[key] for key in ("accuracy", "depths", "lengths", "context_tokens"))
        image = heat_map(axes, *measured)
        axes.set_title(f"{label}\ncontext {result['context_tokens']} tokens", fontsize=10)
        axes.label_outer()
    # the panels share the depth axis, which each heat map inverts
    panels[0].set_ylim(len(result["depths"]), 0)
    colour_bar(figure, image, panels)
    figure.suptitle("Passkeys retrieved, % (orange line: end of the model's context)", fontsize=11)
    save_figure(figure, file)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check(flags)
    with held(flags, "passkey.py", "output_json", "figure"):
        compare(flags)


def compare(flags: argparse.Namespace) -> None:
    own = context_length(load_config(str(flags.base), "--base"))
    # raises now if the shortest length is too short
    PromptMaker(load_tokenizer(str(flags.base))).prompt(min(flags.lengths), 0.0, str(KEYS[-1]))
    extended = merge(flags.adapter, flags.work / "extended") if flags.adapter else flags.base
    context = context_length(load_config(str(extended))) if flags.adapter else flags.context or 8192
    full = {"use_shift_short_attention": False}
    shifted = {"group_size_ratio": flags.group_size_ratio, "full_attention_ratio": flags.full_attention_ratio}
    shifted = full if flags.full_attention else shifted

    def base() -> list[tuple[str, dict[str, Any]]]:
        training = tune_retrieval("base", flags.base, own, full, flags)
        plain = merge(flags.work / "base", flags.work / "base-merged")
        scaled = measure("stretched", ["--base_model", str(plain), "--context_size", str(context)], flags)
        return [
            ("base", measure("base", ["--base_model", str(plain)], flags) | {"training": training}),
            ("base, stretched, untrained at length", scaled),
        ]

    def longqlora() -> list[tuple[str, dict[str, Any]]]:
        training = tune_retrieval("longqlora", extended, context, shifted, flags)
        plain = merge(flags.work / "longqlora", flags.work / "longqlora-merged")
        return [("LongQLoRA", measure("longqlora", ["--base_model", str(plain)], flags) | {"training": training})]

    with ThreadPoolExecutor(min(flags.jobs, 2)) as pool:
        results = dict(chain.from_iterable(job.result() for job in [pool.submit(base), pool.submit(longqlora)]))
    draw(results, flags.figure)
    record = read_record(str(flags.adapter)) if flags.adapter else None
    adapter = record and {key: record[key] for key in ("context_tokens", "group_size", "steps", "trained_tokens")}
    write_json(flags.output_json, {"seed": flags.seed, "adapter": adapter, "contenders": results, **origin()})
    for label, result in results.items():
        means = (sum(column) / len(column) for column in zip(*result["accuracy"], strict=True))
        found = (f"{length}: {100 * mean:.0f} %" for length, mean in zip(result["lengths"], means, strict=True))
        print(f"{label}: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
