"""How are the experiments run? Trains, merges and evaluates them, several at a time on one GPU; resumable.

    python script/experiment/run.py --base output/experiment/base --data output/experiment/data \\
        --work output/experiment --rows longqlora full-attention rolled full --jobs 8 --time_limit_s 540
    python script/experiment/run.py ... --rows all                         # every run of script/experiment/rows.py
    python script/experiment/run.py ... --rows longqlora full --cost         # speed and memory, one run at a time

Each run is `train.py` (or the program that its config names) on a YAML, then `script/evaluate/evaluate.py`. --data
holds train.jsonl, with texts longer than any sample, and NAME.bin files to evaluate on, built with script/data/.
Results: WORK/results/NAME-LENGTH-SEED.json, WORK/cost/NAME-LENGTH-SEED.json; runs that have one are skipped.
"""

import argparse
import json
import shutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from component.cli import exit_on_user_error, new_parser, parsed_first

COST_STEPS = 40


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base of script/experiment/pretrain.py")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and .bin files, see above")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--rows", nargs="+", required=True, help="names from rows.py, or all")
    parser.add_argument("--seeds", type=int, help="at most this many per run (default: as in rows.py)")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens to extend to (default: as in rows.py)")
    parser.add_argument("--windows", type=int, nargs="+", help="tokens per evaluation window (default: as in rows.py)")
    parser.add_argument("--max_steps", type=int, help="train for fewer steps, for a quick test")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--time_limit_s", type=float, help="start no run after this many seconds")
    parser.add_argument("--cost", action="store_true", help=f"train {COST_STEPS} steps of each run, one run at a time")
    return parser.parse_args()


import torch
import yaml
from transformers import AutoConfig

from component.error import UserError, nearest
from component.rope import extend_context
from component.storage.claim import work_folder
from component.storage.result import hardware, origin, write_json
from script.experiment.rows import FULL, RECIPE, TOKENS_PER_STEP, Config, all_runs, main_runs
from script.shared.program import execute, read_training
from script.shared.same_work import same_work


@dataclass(frozen=True)
class Run:
    config: Config
    length: int  # tokens: extended context, and of a training sample
    seed: int

    @property
    def name(self) -> str:
        return f"{self.config.name}-{self.length}-{self.seed}"


def requested_runs(flags: argparse.Namespace) -> list[Run]:
    known = all_runs()
    names = list(known) if flags.rows == ["all"] else flags.rows
    for name in names:
        if name not in known:
            raise UserError(f"--rows: {name!r} is not in script/experiment/rows.py{nearest(name, known)}")
    runs = []
    for config in map(known.__getitem__, names):
        lengths = flags.lengths or config.lengths
        runs += [Run(config, lengths[0], seed) for seed in range(min(config.seeds, flags.seeds or config.seeds))]
        runs += [Run(config, length, 0) for length in lengths[1:]]
    return sorted(runs, key=lambda run: run.seed)  # the first seed of everything before any second one


def do(run: Run, flags: argparse.Namespace) -> dict:
    """Train, evaluate and write the result of one run."""
    start, folder = time.monotonic(), flags.work / ("cost-runs" if flags.cost else "runs") / run.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"row": run.config.name, "label": run.config.label}
    result |= {"length": run.length, "seed": run.seed}
    if run.config.program is None:
        model = save_scaled(flags.base, folder, run) if run.config.rope_type else flags.base
        words = ["--base_model", str(model)]
    else:
        result |= train(run, flags, folder)
        words = ["--base_model" if run.config.program == FULL else "--peft_model", str(folder)]
    if not flags.cost:
        tasks = [task("full", words)]
        if run.seed == 0 and run.config in main_runs():
            tasks.append(task("full", [*words, "--seq_len", str(run.length)], protocol="sliding"))
        if run.length == run.config.lengths[0]:
            tasks += further_tasks(run, folder, words, result.get("settings", {}), flags)
        result["evaluation"] = evaluate(run, tasks, flags)
        shutil.rmtree(folder.with_name(f"{run.name}-merged"), ignore_errors=True)
    result |= {"seconds": round(time.monotonic() - start, 1), **origin()}
    write_json(flags.work / ("cost" if flags.cost else "results") / f"{run.name}.json", result)
    return result


def train(run: Run, flags: argparse.Namespace, folder: Path) -> dict:
    """Train; returns the YAML's settings, the contents of train_results.json, and [step, loss] pairs."""
    settings = settings_of(run, flags, folder)
    file = folder.parent / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    assert run.config.program
    execute([run.config.program, "--train_args_file", str(file)], file.with_suffix(".log"))
    training, log_entries = read_training(folder)
    losses = [[entry["step"], entry["loss"]] for entry in log_entries]
    return {"settings": settings, "training": training, "losses": losses}


def save_scaled(base: Path, folder: Path, run: Run) -> Path:
    """Copy the base to `folder` with scaled positions; edits files only, since this runs in parallel threads."""
    config = AutoConfig.from_pretrained(base)
    assert run.config.rope_type
    extend_context(config, run.length, run.config.rope_type)
    shutil.copytree(base, folder, dirs_exist_ok=True)
    config.save_pretrained(folder)
    return folder


def settings_of(run: Run, flags: argparse.Namespace, folder: Path) -> dict:
    """The YAML of a run."""
    paths = {"model_name_or_path": flags.base, "train_file": flags.data / "train.jsonl", "output_dir": folder}
    lengths = {"max_seq_length": run.length, "model_max_length": run.length}
    # dynamic positions depend on the longest row of a batch, so train.py takes them one by one
    is_dynamic = run.config.changes.get("rope_type") == "dynamic"
    size = "gradient_accumulation_steps" if is_dynamic else "per_device_train_batch_size"
    batch = {"per_device_train_batch_size": 1, size: max(1, TOKENS_PER_STEP // run.length), "seed": run.seed}
    precision = {"bf16": True} if torch.cuda.is_available() else {}
    settings = RECIPE | {key: str(path) for key, path in paths.items()} | lengths | batch | precision
    settings |= run.config.changes
    steps = flags.max_steps or (COST_STEPS if flags.cost else None)
    return settings | ({"max_steps": steps} if steps else {})


def task(kind: str, words: list[str], *, protocol: str = "longlora", group_size: int | None = None) -> dict:
    """One evaluation: its name in the results, and its entry in the tasks of script/experiment/measure.py."""
    attention = kind if kind in ("shift_short", "rolled") else None
    return {"kind": kind, "protocol": protocol, "words": words, "attention": attention, "group_size": group_size}


def further_tasks(run: Run, folder: Path, words: list[str], settings: dict, flags: argparse.Namespace) -> list[dict]:
    """The evaluations of `Config.also`: under the training attention, on the NF4 base, merged onto either base."""
    tasks, short = [], ["--seq_len", *map(str, flags.windows or (1024, run.length))]
    for kind in run.config.also:
        if kind in ("shift_short", "rolled"):
            group = int(settings.get("group_size_ratio", 0.25) * run.length)
            tasks.append(task(kind, [*words, "--seq_len", str(run.length)], group_size=group))
        elif kind == "nf4":
            tasks.append(task(kind, [*words, "--load_in_4bit", *short]))
        else:
            target = folder.with_name(f"{run.name}-merged") / kind
            target.parent.mkdir(exist_ok=True)
            merge = ["--adapter_name_or_path", str(folder), "--save_path", str(target), "--check", "no", "--overwrite"]
            base = kind.removeprefix("merged-")
            execute(["script/merge_lora.py", *merge, "--base", base], folder.with_name(f"{run.name}-{kind}.log"))
            tasks.append(task(kind, ["--base_model", str(target), *short]))
    return tasks


def evaluate(run: Run, tasks: list[dict], flags: argparse.Namespace) -> dict:
    """{kind: {text: {protocol: results of evaluate.py}}}."""
    batch = "16" if torch.cuda.is_available() else "1"
    windows = [str(tokens) for tokens in flags.windows or run.config.windows]
    outputs, requests = [], []
    for one in tasks:
        for file in sorted(flags.data.glob("*.bin")):
            output = flags.work / "runs" / f"{run.name}-{one['kind']}-{file.stem}-{one['protocol']}.json"
            words = ["--data_path", str(file), "--protocol", one["protocol"], "--output_json", str(output)]
            words += ["--overwrite", "--seq_len", *windows, "--batch_size", batch, *one["words"]]
            requests.append({"words": words, "attention": one["attention"], "group_size": one["group_size"]})
            outputs.append((one["kind"], file.stem, one["protocol"], output))
    file = flags.work / "runs" / f"{run.name}-tasks.json"
    file.write_text(json.dumps(requests), encoding="utf-8")
    execute(["script/experiment/measure.py", str(file)], file.with_suffix(".log"))
    found: dict[str, dict] = {}
    for kind, text, protocol, output in outputs:
        found.setdefault(kind, {}).setdefault(text, {})[protocol] = json.loads(output.read_text())["results"]
    return found


@exit_on_user_error
def main() -> None:
    flags, start = parse_flags(), time.monotonic()
    for name in ("base", "data", "work"):  # programs run from the repository root
        setattr(flags, name, getattr(flags, name).resolve())
    kept = {} if flags.cost else {"max_steps": flags.max_steps, "windows": flags.windows}
    files = {file.name: file for file in sorted((*flags.data.glob("*.bin"), *flags.data.glob("train.jsonl")))}
    file = flags.work / ("cost-flags.json" if flags.cost else "flags.json")
    record = same_work(file, kept, {"base": flags.base, **files})
    read = {"--base": [flags.base], "--data": [flags.data]}
    with work_folder(flags.work / ("cost-runs" if flags.cost else "runs"), "run.py", read):
        write_json(file, record)
        do_all(flags, start)


def do_all(flags: argparse.Namespace, start: float) -> None:
    """Do the requested runs that have no result yet; `start` is the time from which --time_limit_s counts."""
    results = flags.work / ("cost" if flags.cost else "results")
    results.mkdir(parents=True, exist_ok=True)
    waiting = [run for run in requested_runs(flags) if not (results / f"{run.name}.json").is_file()]
    if flags.cost:  # nothing else may run on the GPU
        flags.jobs, waiting = 1, [run for run in waiting if run.config.program and run.seed == 0]
    print(f"{len(waiting)} runs, {flags.jobs} at a time, on {hardware()}", flush=True)
    failures = []

    def one(run: Run) -> str:
        if flags.time_limit_s is not None and time.monotonic() - start > flags.time_limit_s:
            return f"{run.name}: skipped, --time_limit_s reached"
        try:
            return f"{run.name}: {do(run, flags)['seconds']} s"
        except Exception as error:  # the other runs continue
            failures.append(run.name)
            if not isinstance(error, UserError):
                traceback.print_exc()
            return f"{run.name}: {error}"

    with ThreadPoolExecutor(flags.jobs) as pool:
        for done in as_completed([pool.submit(one, run) for run in waiting]):
            print(done.result(), flush=True)
    if failures:
        raise UserError(f"{len(failures)} runs failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
