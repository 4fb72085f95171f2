"""Do the shipped YAMLs run end to end at LLaMA2's size in 32 GiB, and how fast? On random weights.

    python script/performance/real_shape.py --size 7b --tokenizer LLAMA2_TOKENIZER --work WORK --output_json FILE

Creates the model, then runs the commands of README.md, capped at 32 GiB and with the attention kernels of a V100:
deepspeed train.py for two optimizer steps, a second launch that resumes for the third, merge_lora.py, and evaluate.py
at 8192 tokens.
"""

import argparse
import json
import platform
import shutil
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first

YAMLS = {"7b": "llama2-7b-pretrain", "13b": "vicuna-13b-sft", "tiny": "vicuna-13b-sft"}


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--size", choices=YAMLS, required=True, help="shape of the model")
    parser.add_argument("--tokenizer", required=True, help="folder with the LLaMA2 tokenizer")
    parser.add_argument("--work", type=Path, required=True, help="folder for model, data and runs")
    parser.add_argument("--seq_len", type=int, default=8192, help="tokens per sample and window (8192)")
    parser.add_argument("--overrides", default="--use_flash_attn false --memory_budget_gib 32", help="for train.py")
    parser.add_argument("--output_json", type=Path, required=True, help="file for the results")
    return parser.parse_args()


import numpy as np
import torch
from transformers import AutoTokenizer

from component.storage.claim import held_result, work_folder
from component.storage.result import library_versions, write_json
from script.shared.program import read_training, show_and_run
from script.shared.random_model import make_model
from script.shared.stdlib import default_library, split_library


def make_data(folder: Path, seq_len: int) -> None:
    """Samples of more than `seq_len` tokens in both formats and a `.bin` of six windows, from the standard library."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(split_library(default_library())[0].values())
    size = 6 * seq_len  # characters; LLaMA2 averages about 3 per token
    rows = [text[start : start + size] for start in range(0, min(len(text), 60 * size) - size, size)]
    for name, row in (("text", lambda r: {"text": r}), ("sft", lambda r: {"input": r[: size // 4], "output": r})):
        lines = [json.dumps(row(r)) for r in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "base", model_max_length=10**9)
    np.array(tokenizer(text[: 40 * seq_len]).input_ids[: 6 * seq_len], dtype=np.uint16).tofile(folder / "eval.bin")


def run(command: str, results: dict, name: str) -> None:
    results[name] = {"command": command, "seconds": round(show_and_run(command), 1)}


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    read = {"--tokenizer": [flags.tokenizer]}
    with work_folder(flags.work, "real_shape.py", read), held_result(flags.output_json):
        measure(flags)


def measure(flags: argparse.Namespace) -> None:
    work = flags.work.resolve()
    results: dict[str, dict] = {}
    make_model(flags.size, flags.tokenizer, work / "base")
    make_data(work / "data", flags.seq_len)
    yaml = f"train_args/{YAMLS[flags.size]}.yaml"
    data = work / "data" / ("sft.jsonl" if "sft" in yaml else "text.jsonl")
    train = (
        f"deepspeed train.py --train_args_file {yaml} --model_name_or_path {work}/base --train_file {data} "
        f"--output_dir {work}/run --logging_steps 1 --save_steps 1 {flags.overrides}"
    )
    for name, steps in (("train", 2), ("resume", 3)):
        run(f"{train} --max_steps {steps}", results, name)
        results[name]["metrics"], results[name]["steps"] = read_training(work / "run")
    merge = f"python script/merge_lora.py --adapter_name_or_path {work}/run --save_path {work}/merged"
    run(merge, results, "merge")
    shutil.rmtree(work / "run" / "checkpoint-1", ignore_errors=True)
    evaluate = (
        f"python script/evaluate/evaluate.py --base_model {work}/merged --seq_len {flags.seq_len} "
        f"--data_path {work}/data/eval.bin --output_json {work}/evaluation.json"
    )
    run(evaluate, results, "evaluate")
    results["evaluate"]["result"] = json.loads((work / "evaluation.json").read_text(encoding="utf-8"))
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    origin = {"size": flags.size, "hardware": hardware, "date": str(date.today()), "versions": library_versions()}
    write_json(flags.output_json, {**origin, **results})


if __name__ == "__main__":
    main()
