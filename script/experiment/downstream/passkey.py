"""Pass keys found by the base and by LongQLoRA, each after a short instruction tuning for it.

    python script/experiment/downstream/passkey.py --base output/experiment/base --work output/experiment/passkey \\
        --adapter output/experiment/runs/yarn-last-8192-0 \\
        --output_json figure/experiment_passkey.json --figure figure/experiment_passkey.png
    python script/experiment/downstream/passkey.py --base BASE --work DIR ... --context 4096     # without an adapter

Three contenders: the base, tuned at its own length with full attention; the same, its positions then stretched and
not trained; and the adapter, merged and tuned at its extended length with S2-Attn, in the last steps with full
attention. Both trainings take the same steps, tokens per step and rank. They read prompts of
component/evaluate/passkey.py of random length (log-uniform) and depth, in the very tokens that
script/evaluate/passkey.py measures with, and never a key that is measured.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from component.checkpoint import read_record
from component.cli import exit_on_user_error
from component.data.chat_template import as_messages
from component.error import UserError
from component.evaluate.figure import colour_bar, heat_map
from component.evaluate.passkey import KEYS, PromptMaker, draw_key, even_depths
from component.model import load_config
from component.rope import context_length
from component.storage.result import origin, save_figure, write_json
from component.tokenizer import UNLIMITED, load_tokenizer
from script.experiment.downstream.passkey_samples import spelling_end_to_end, training_samples
from script.experiment.downstream.tuning import check_flags, measured, merge, tune


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the base of script/experiment/pretrain.py")
    parser.add_argument("--adapter", type=Path, help="LongQLoRA's adapter (default: none, the base is stretched)")
    parser.add_argument("--context", type=int, help="tokens to stretch to without --adapter (8192)")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and logs")
    parser.add_argument("--steps", type=int, default=600, help="of each training (600)")
    parser.add_argument("--tokens_per_step", type=int, default=16384, help="in packed rows (16384)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="(1e-3)")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA, and its alpha (64)")
    parser.add_argument("--group_size_ratio", type=float, default=0.25, help="of LongQLoRA's rows (0.25)")
    parser.add_argument(
        "--full_attention_ratio", type=float, default=0.1, help="of LongQLoRA's steps, at the end (0.1)"
    )
    parser.add_argument("--full_attention", action="store_true", help="no S2-Attn in LongQLoRA's tuning either")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--depths", type=int, default=9, help="measured, evenly from first line to last (9)")
    parser.add_argument("--trials", type=int, default=5, help="measured per length and depth (5)")
    parser.add_argument("--seed", type=int, default=42, help="of the measurement; training draws others (42)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings and measurements at a time (1)")
    parser.add_argument("--output_json", required=True, help="file for the results")
    parser.add_argument("--figure", required=True, help="PNG file for the heat maps")
    flags = parser.parse_args()
    counts = ("steps", "tokens_per_step", "rank", "depths", "trials", "jobs")
    check_flags(flags, counts=counts, results=("output_json", "figure"), folders=("base", "work", "adapter"))
    if flags.adapter and flags.context:
        raise UserError(f"--context: {flags.context}, but {flags.adapter} knows how far it is stretched; leave it out")
    return flags


def write_samples(model: Path, file: Path, longest: int, flags: argparse.Namespace) -> dict[str, int]:
    """What a training reads, once through, for train.py; how much it is."""
    tokenizer = load_tokenizer(str(model), UNLIMITED)
    settings = product(flags.lengths, even_depths(flags.depths), range(flags.trials))
    banned = {draw_key(flags.seed, *setting) for setting in settings}
    tokens, samples = flags.steps * flags.tokens_per_step, 0
    with file.open("w", encoding="utf-8") as out:
        for turns in training_samples(tokenizer, tokens, longest, banned, flags.seed):
            out.write(json.dumps({"messages": as_messages(turns)}) + "\n")
            samples += 1
    return {"samples": samples, "longest_tokens": longest}


def teach(
    name: str, model: Path, context: int, attention: dict[str, Any], flags: argparse.Namespace
) -> dict[str, Any]:
    """Tune `model` for pass keys at `context` tokens, in WORK/NAME."""
    model = spelling_end_to_end(model, flags.work / f"{name}-base")
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
    """The heat maps of all contenders side by side."""
    count = len(results)
    figure, panels = plt.subplots(1, count, figsize=(0.8 + 4.4 * count, 4.6), layout="constrained", sharey=True)
    for axes, (label, result) in zip(panels, results.items(), strict=True):
        measured = (result[key] for key in ("accuracy", "depths", "lengths", "context_tokens"))
        image = heat_map(axes, *measured)
        axes.set_title(f"{label}\ncontext {result['context_tokens']} tokens", fontsize=10)
        axes.label_outer()
    # axes that share their depths are turned upside down once, not once per panel
    panels[0].set_ylim(len(result["depths"]), 0)
    colour_bar(figure, image, panels)
    figure.suptitle("Pass keys found, per cent (orange line: the model's context ends)", fontsize=11)
    save_figure(figure, file)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    own = context_length(load_config(str(flags.base), "--base"))
    PromptMaker(load_tokenizer(str(flags.base))).prompt(min(flags.lengths), 0.0, str(KEYS[-1]))  # refused early
    flags.work.mkdir(parents=True, exist_ok=True)
    extended = merge(flags.adapter, flags.work / "extended") if flags.adapter else flags.base
    context = context_length(load_config(str(extended))) if flags.adapter else flags.context or 8192
    full = {"use_shift_short_attention": False}
    shifted = {"group_size_ratio": flags.group_size_ratio, "full_attention_ratio": flags.full_attention_ratio}
    shifted = full if flags.full_attention else shifted

    def base() -> list[tuple[str, dict[str, Any]]]:
        training = teach("base", flags.base, own, full, flags)
        plain = merge(flags.work / "base", flags.work / "base-merged")
        stretched = measure("stretched", ["--base_model", str(plain), "--context_size", str(context)], flags)
        return [
            ("base", measure("base", ["--base_model", str(plain)], flags) | {"training": training}),
            ("base, stretched, untrained at length", stretched),
        ]

    def longqlora() -> list[tuple[str, dict[str, Any]]]:
        training = teach("longqlora", extended, context, shifted, flags)
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
        found = ", ".join(
            f"{length}: {100 * mean:.0f} %" for length, mean in zip(result["lengths"], means, strict=True)
        )
        print(f"{label}: {found}", flush=True)


if __name__ == "__main__":
    main()
