"""Train, merge and evaluate the rows of the experiments, several at a time on one GPU; what is done is not done again.

    python script/experiment/run.py --base output/experiment/base --data output/experiment/data \\
        --work output/experiment --rows longqlora full-attention rolled full --jobs 8 --time_limit_s 540
    python script/experiment/run.py ... --rows all             # every row of script/experiment/rows.py

    python script/experiment/run.py ... --rows longqlora full --cost             # speed and memory, each row alone

Every row is `train.py` (or the program that the row names) on a YAML, then `script/evaluate/evaluate.py`.
--data holds train.jsonl, texts longer than any row, and NAME.bin files to evaluate on, made by script/data/.
Results: WORK/results/ROW-LENGTH-SEED.json, WORK/cost/ROW-LENGTH-SEED.json.
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
import torch
import yaml
from transformers import AutoConfig

from component.cli import exit_on_user_error
from component.error import UserError, nearest
from component.rope import extend_context
from component.storage.result import hardware, origin, write_json
from script.experiment.rows import FULL, RECIPE, TOKENS_PER_STEP, Row, all_rows, main_rows
from script.shared.program import execute

COST_STEPS = 40


@dataclass(frozen=True)
class Run:
    row: Row
    length: int  # tokens that the context is extended to, and of a training row
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row.name}-{self.length}-{self.seed}"


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the base of script/experiment/pretrain.py")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train.jsonl and .bin files to evaluate on"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--rows", nargs="+", required=True, help="names of rows, or all")
    parser.add_argument("--seeds", type=int, help="at most so many per row (default: as many as the row says)")
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of those that the row says")
    parser.add_argument("--windows", type=int, nargs="+", help="tokens to evaluate at, instead of the row's")
    parser.add_argument("--max_steps", type=int, help="train shorter, to try the script out")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--time_limit_s", type=float, help="start no row after this")
    parser.add_argument("--cost", action="store_true", help=f"train {COST_STEPS} steps of each row, nothing beside it")
    return parser.parse_args()


def asked_runs(flags: argparse.Namespace) -> list[Run]:
    known = all_rows()
    names = list(known) if flags.rows == ["all"] else flags.rows
    for name in names:
        if name not in known:
            raise UserError(f"--rows: {name!r} is no row{nearest(name, known)}")
    runs = []
    for row in map(known.__getitem__, names):
        lengths = flags.lengths or row.lengths
        runs += [Run(row, lengths[0], seed) for seed in range(min(row.seeds, flags.seeds or row.seeds))]
        runs += [Run(row, length, 0) for length in lengths[1:]]
    return sorted(runs, key=lambda run: run.seed)  # a cut-off run has all rows once before it has one twice


def do(run: Run, flags: argparse.Namespace) -> dict:
    """Train what the row trains, evaluate it, and keep what came out."""
    start, folder = time.monotonic(), flags.work / ("cost-runs" if flags.cost else "runs") / run.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"row": run.row.name, "says": run.row.says, "length": run.length, "seed": run.seed}
    if run.row.program is None:
        model = stretched(flags.base, folder, run) if run.row.rope_type else flags.base
        words = ["--base_model", str(model)]
    else:
        result |= train(run, flags, folder)
        words = ["--base_model" if run.row.program == FULL else "--peft_model", str(folder)]
    if not flags.cost:
        tasks = [task("full", words)]
        if run.seed == 0 and run.row in main_rows():
            tasks.append(task("full", [*words, "--seq_len", str(run.length)], protocol="sliding"))
        if run.length == run.row.lengths[0]:
            tasks += further_tasks(run, folder, words, result.get("settings", {}), flags)
        result["evaluation"] = evaluate(run, tasks, flags)
        shutil.rmtree(folder.with_name(f"{run.name}-merged"), ignore_errors=True)
    result |= {"seconds": round(time.monotonic() - start, 1), **origin()}
    write_json(flags.work / ("cost" if flags.cost else "results") / f"{run.name}.json", result)
    return result


def train(run: Run, flags: argparse.Namespace, folder: Path) -> dict:
    """Its YAML, what train.py says of the run, and [step, loss] along it."""
    settings = settings_of(run, flags, folder)
    file = folder.parent / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    assert run.row.program
    execute([run.row.program, "--train_args_file", str(file)], file.with_suffix(".log"))
    training = json.loads((folder / "train_results.json").read_text())
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]
    return {"settings": settings, "training": training, "losses": losses}


def stretched(base: Path, folder: Path, run: Run) -> Path:
    """The base with stretched positions, as a model folder of its own: files alone, since threads load no models."""
    config = AutoConfig.from_pretrained(base)
    assert run.row.rope_type
    extend_context(config, run.length, run.row.rope_type)
    shutil.copytree(base, folder, dirs_exist_ok=True)
    config.save_pretrained(folder)
    return folder


def settings_of(run: Run, flags: argparse.Namespace, folder: Path) -> dict:
    """The YAML of a run."""
    paths = {"model_name_or_path": flags.base, "train_file": flags.data / "train.jsonl", "output_dir": folder}
    lengths = {"max_seq_length": run.length, "model_max_length": run.length}
    batch = {"per_device_train_batch_size": max(1, TOKENS_PER_STEP // run.length), "seed": run.seed}
    precision = {"bf16": True} if torch.cuda.is_available() else {}
    settings = RECIPE | {key: str(path) for key, path in paths.items()} | lengths | batch | precision | run.row.changes
    steps = flags.max_steps or (COST_STEPS if flags.cost else None)
    return settings | ({"max_steps": steps} if steps else {})


def task(kind: str, words: list[str], *, protocol: str = "longlora", group_size: int | None = None) -> dict:
    """One evaluation: what it is called in the results, and what script/experiment/measure.py is told."""
    attention = kind if kind in ("shift_short", "rolled") else None
    return {"kind": kind, "protocol": protocol, "words": words, "attention": attention, "group_size": group_size}


def further_tasks(run: Run, folder: Path, words: list[str], settings: dict, flags: argparse.Namespace) -> list[dict]:
    """The evaluations of `Row.also`: under the attention trained with, on the NF4 base, merged on either base."""
    tasks, short = [], ["--seq_len", *map(str, flags.windows or (1024, run.length))]
    for kind in run.row.also:
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
    outputs, asked = [], []
    for one in tasks:
        for file in sorted(flags.data.glob("*.bin")):
            output = flags.work / "runs" / f"{run.name}-{one['kind']}-{file.stem}-{one['protocol']}.json"
            words = ["--data_path", str(file), "--protocol", one["protocol"], "--output_json", str(output)]
            words += ["--seq_len", *map(str, flags.windows or run.row.windows), "--batch_size", batch, *one["words"]]
            asked.append({"words": words, "attention": one["attention"], "group_size": one["group_size"]})
            outputs.append((one["kind"], file.stem, one["protocol"], output))
    file = flags.work / "runs" / f"{run.name}-tasks.json"
    file.write_text(json.dumps(asked), encoding="utf-8")
    execute(["script/experiment/measure.py", str(file)], file.with_suffix(".log"))
    found: dict[str, dict] = {}
    for kind, text, protocol, output in outputs:
        found.setdefault(kind, {}).setdefault(text, {})[protocol] = json.loads(output.read_text())["results"]
    return found


@exit_on_user_error
def main() -> None:
    flags, start = parse_flags(), time.monotonic()
    for name in ("base", "data", "work"):  # programs are run from the repository's root
        setattr(flags, name, getattr(flags, name).resolve())
    results = flags.work / ("cost" if flags.cost else "results")
    results.mkdir(parents=True, exist_ok=True)
    waiting = [run for run in asked_runs(flags) if not (results / f"{run.name}.json").is_file()]
    if flags.cost:  # what shares the card with nothing
        flags.jobs, waiting = 1, [run for run in waiting if run.row.program and run.seed == 0]
    print(f"{len(waiting)} runs, {flags.jobs} at a time, on {hardware()}", flush=True)
    failures = []

    def one(run: Run) -> str:
        if flags.time_limit_s is not None and time.monotonic() - start > flags.time_limit_s:
            return f"{run.name}: not begun, --time_limit_s is spent"
        try:
            return f"{run.name}: {do(run, flags)['seconds']} s"
        except Exception as error:  # of one run: the others go on
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
