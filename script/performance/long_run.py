"""Over a thousand steps, do all memory options together leave the losses unchanged and memory use constant?

    python script/performance/long_run.py --work output/long-run --output_json figure/long_run.json

Trains the demo's model twice in parallel, with every memory option and with none, in fp32 on one GPU or on the CPU.
"""

import argparse
import shlex
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from component.cli import check_at_least, exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--steps", type=int, default=1000, help="of each run, at least 40 (1000)")
    parser.add_argument("--output_json", type=Path, required=True, help="file for the results")
    return parser.parse_args()


import psutil
import torch

from component.storage.claim import held_result, work_folder
from component.storage.result import library_versions, write_json
from script.shared.program import read_training

LOGGED_EVERY = 20  # steps; memory is compared between the second entry and the last
MEMORY_OPTIONS = (
    "--keep_layers 1 --keep_attention_layers 1 --keep_attention_output true --offload_activations true "
    "--mlp_tile_tokens 300 --loss_chunk_tokens 200"
)


def command(name: str, work: Path, steps: int) -> str:
    memory_options = MEMORY_OPTIONS if name == "levers" else "--memory_plan false"
    return (
        f"{sys.executable} train.py --train_args_file train_args/demo.yaml --train_file {work}/data/train.jsonl "
        f"--output_dir {work}/{name} --overwrite_output_dir true --max_steps {steps} --logging_steps {LOGGED_EVERY} "
        f"--max_seq_length 1024 --lora_dropout 0 --save_strategy no --deepspeed null {memory_options}"
    )


def host_gib(process: psutil.Process) -> float:
    """Resident CPU memory of the process; 0 if it has ended."""
    try:
        return round(process.memory_info().rss / 2**30, 3)
    except psutil.NoSuchProcess:
        return 0.0


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_at_least(flags, 2 * LOGGED_EVERY, "steps")
    with work_folder(flags.work, "long_run.py", {}), held_result(flags.output_json):
        measure(flags)


def measure(flags: argparse.Namespace) -> None:
    work = flags.work.resolve()
    subprocess.run([sys.executable, "script/demo/data.py", "--output", f"{work}/data"], cwd=ROOT, check=True)
    commands = {name: command(name, work, flags.steps) for name in ("levers", "plain")}
    running = {}
    for name, line in commands.items():
        log = (work / f"{name}.log").open("w")
        running[name] = subprocess.Popen(shlex.split(line), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    host: dict[str, list[float]] = {name: [] for name in running}
    while any(process.poll() is None for process in running.values()):
        for name, process in running.items():
            if process.poll() is None:
                host[name].append(host_gib(psutil.Process(process.pid)))
        time.sleep(2)
    shown = {
        name: line.replace(sys.executable, "python").replace(str(work), "WORK") for name, line in commands.items()
    }
    result: dict[str, Any] = {"date": str(date.today()), "commands": shown, "versions": library_versions()}
    result["hardware"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for name, process in running.items():
        if process.returncode:
            sys.exit(f"{name} failed; see {work}/{name}.log")
        _, rows = read_training(work / name)
        result[name] = {
            "losses": [row["loss"] for row in rows],
            "reserved_gib": [row.get("reserved_gib") for row in rows],
            "host_gib": host[name],
        }
    gaps = [abs(a - b) for a, b in zip(result["levers"]["losses"], result["plain"]["losses"], strict=True)]
    result["largest_gap"] = max(gaps)
    print(f"{flags.steps} steps: losses differ by at most {max(gaps):.2g}")
    for name in commands:
        reserved, held = result[name]["reserved_gib"], result[name]["host_gib"]
        print(f"{name}: GPU {reserved[1]} -> {reserved[-1]} GiB, host {held[len(held) // 3]} -> {held[-1]} GiB")
    write_json(flags.output_json, result)


if __name__ == "__main__":
    main()
