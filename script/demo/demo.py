"""Does LongQLoRA extend a small Llama from 512 to 2048 tokens on this machine's CPU? Run by make demo.

    python script/demo/demo.py

Each step is an ordinary command, printed before it runs. Takes about 8 minutes. Results: output/demo/.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    return new_parser(__doc__).parse_args()


import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from component.error import UserError
from component.storage.claim import work_folder
from component.storage.result import library_versions
from script.shared.program import show_and_run

BASE, DATA, RUN, MERGED = "script/demo/base", "output/demo-data", "output/demo", "output/demo-merged"
RESULTS = f"{RUN}-results"
LENGTHS = ["256", "512", "1024", "2048"]
TRAINED_LENGTH = 512


def run(title: str, command: str) -> None:
    print(f"\n=== {title}", flush=True)
    print(f"({show_and_run(command):.0f} s)", flush=True)


def evaluate(title: str, name: str, options: str) -> dict[int, float]:
    """Perplexity by window length on the held-out files."""
    results = f"{RESULTS}/{name}.json"
    arguments = f"{options} --data_path {DATA}/heldout.bin --seq_len {' '.join(LENGTHS)} --output_json {results}"
    run(title, f"python script/evaluate/evaluate.py {arguments}")
    rows = json.loads((ROOT / results).read_text(encoding="utf-8"))["results"]
    return {row["seq_len"]: row["perplexity"] for row in rows}


def draw(rows: dict[str, dict[int, float]], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, row), style in zip(rows.items(), ("o--", "s--", "D-"), strict=True):
        axes.plot(list(row), list(row.values()), style, label=name)
    axes.axvline(TRAINED_LENGTH, color="grey", linewidth=0.8)
    axes.annotate(" pretrained at 512", (TRAINED_LENGTH, axes.get_ylim()[1]), fontsize=8, color="grey", va="top")
    lengths = [int(length) for length in LENGTHS]
    axes.set(xscale="log", yscale="log", xlabel="window in tokens", ylabel="perplexity on held-out files (log)")
    axes.set_xticks(lengths, LENGTHS)
    axes.minorticks_off()
    highest = max(value for row in rows.values() for value in row.values())
    ticks = [tick for tick in (5, 7, 10, 15, 20, 30, 50, 100, 200) if tick < 1.3 * highest]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_title("Context extended fourfold on two CPU cores", fontsize=11)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


def table(rows: dict[str, dict[int, float]]) -> str:
    head = f"{'perplexity at window of':<28}" + "".join(f"{length:>9}" for length in LENGTHS)
    lines = (f"{name:<28}" + "".join(f"{value:>9.2f}" for value in row.values()) for name, row in rows.items())
    return "\n".join([head, *lines])


def remove_earlier(root: Path = ROOT) -> None:
    """Delete what an earlier demo left; inside of `work_folder`, whose mark tells it from what others wrote."""
    for folder in (DATA, RUN, MERGED):
        shutil.rmtree(root / folder, ignore_errors=True)
    for file in (root / RESULTS).glob("*.json"):
        file.unlink()


def check_folders(root: Path = ROOT) -> None:
    """Refuse folders that are not an earlier demo's."""
    for name in (DATA, RUN, MERGED):
        if (root / name).exists() and not (root / RESULTS).exists():
            raise UserError(f"{name}: exists, but no demo wrote it, and this one would replace it; rename it")


@exit_on_user_error
def main() -> None:
    parse_flags()
    check_folders()
    with work_folder(ROOT / RESULTS, "demo.py", {}, "make demo"):
        remove_earlier()
        extend()


def extend() -> None:
    """The demo's steps."""
    start = time.monotonic()
    run("data from this Python's standard library", f"python script/demo/data.py --output {DATA}")
    rows = {"base": evaluate("the base, positions unchanged", "base", f"--base_model {BASE}")}
    interpolated = f"--base_model {BASE} --context_size 2048"
    rows["interpolated, untrained"] = evaluate("positions interpolated, untrained", "interpolated", interpolated)
    print("\n(the first launch of DeepSpeed on a machine compiles an operator for about a minute)", flush=True)
    run("training with LongQLoRA", "deepspeed train.py --train_args_file train_args/demo.yaml")
    run("merging the adapter", f"python script/merge_lora.py --adapter_name_or_path {RUN}")
    rows["LongQLoRA"] = evaluate("the extended model", "longqlora", f"--base_model {MERGED}")
    prompt = f"--prompt_file {DATA}/prompt.txt --max_new_tokens 80 --do_sample false --repetition_penalty 1.1"
    inference = f"python script/inference/inference.py --model_name_or_path {MERGED} {prompt}"
    run("continuing a held-out file after more than 1500 tokens", inference)
    draw(rows, ROOT / RUN / "perplexity.png")
    origin = {"command": "make demo", "date": str(date.today()), "cores": os.cpu_count()}
    record = {
        **origin,
        "versions": library_versions(),
        "python": platform.python_version(),
        "protocol": "longlora",
        "perplexity": rows,
    }
    (ROOT / RUN / "perplexity.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(rows)}\n\nfigure: {RUN}/perplexity.png; total time: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
