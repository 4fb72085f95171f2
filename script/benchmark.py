"""How fast is training with LongQLoRA and with the alternatives, and in how much memory, on one or more GPUs?

    python script/benchmark.py --work /tmp/work --tokenizer LLAMA2_TOKENIZER --sizes 7b --lengths 8192 32768 \\
        --kinds ours_fastest ours_leanest unsloth hf original --output_json figure/benchmark.json
    python script/benchmark.py ... --row 7b:131072:ours_fastest --row 7b:131072:unsloth:3 --time_limit_s 500 --resume
    python script/benchmark.py ... --plan rows.json  # [{"size", "length", "kind", "steps", "overrides", "cards"}, ...]

Each row (size, length, kind) runs in its own process on a random-weight model; results are rewritten after each row.
ours_* is `deepspeed train.py` with the settings in script/shared/benchmark_row.py (by_heads: another program, for
several cards; fp8, fp8_backward: fastest, with that frozen_matmul); ours_python_* is `python train.py` without
DeepSpeed; the other kinds are baselines in script/performance/peers.py. `overrides` are keys of train.py's YAML (for a
baseline: memory_budget_gib). On several `cards`, ours_* trains one row per card, or splits rows with the override
sequence_parallel_size; ours_python_* is then torchrun, and memory is that of the card with the most. All kinds: batch
size 1, no gradient accumulation, rank 64 on all linear layers, NF4 with double quantization, no dropout, gradient
clipping.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, fields
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from component.cli import exit_on_user_error, new_parser, parsed_first
from script.shared.benchmark_row import KINDS, OURS, RECIPE, Row, is_done, key
from script.shared.shape import SHAPES


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, data and logs; kept for reuse")
    parser.add_argument("--tokenizer", required=True, help="folder with a tokenizer of at most the model's vocabulary")
    parser.add_argument("--sizes", nargs="+", default=[], help=", ".join(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[], help="tokens")
    parser.add_argument("--kinds", nargs="+", default=[], help=", ".join(KINDS))
    parser.add_argument("--row", action="append", default=[], help="size:length:kind or size:length:kind:steps")
    parser.add_argument("--plan", type=Path, help="JSON or YAML list of rows")
    parser.add_argument("--time_limit_s", type=float, help="kill the running row after this, skip the others")
    parser.add_argument("--row_limit_s", type=float, default=1200, help="kill a row after this many seconds (1200)")
    parser.add_argument("--output_json", type=Path, required=True, help="file for the results")
    parser.add_argument("--resume", action="store_true", help="keep what --output_json has, measure the rest")
    return parser.parse_args()


import torch
import yaml

from component.error import UserError
from component.storage.claim import held_result, work_folder
from component.storage.result import LIBRARIES, library_versions, write_json
from script.performance.report import commit, failure, mfu, published_flop, read_results, speed, step_flop, table
from script.shared.card import describe_card
from script.shared.program import free_port, in_a_process, read_training, run
from script.shared.random_model import make_model
from script.shared.stdlib import default_library, split_library

GPU_ONLY = {"bf16", "fp16", "memory_budget_gib", "use_flash_attn", "use_liger_kernel"}


@exit_on_user_error
def main() -> None:
    flags, start = parse_flags(), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # lets `run` kill its children
    read = {"--tokenizer": [flags.tokenizer], "--plan": [flags.plan]}
    with work_folder(flags.work, "benchmark.py", read), held_result(flags.output_json):
        measure_rows(flags, start)


def measure_rows(flags: argparse.Namespace, start: float) -> None:
    rows, work = requested_rows(flags), flags.work.resolve()
    old, card = read_results(flags.output_json, flags.resume), in_a_process(describe_card)
    if old.get("hardware", card["hardware"]) != card["hardware"]:
        raise UserError(f"--resume: {flags.output_json} was measured on {old['hardware']}, not {card['hardware']}")
    command = shlex.join(["python", "script/benchmark.py", *sys.argv[1:]])
    versions = library_versions((*LIBRARIES, "unsloth", "liger-kernel"))
    if changed := [
        f"{name} {old}" for name, old in old.get("versions", versions).items() if versions.get(name) != old
    ]:
        raise UserError(
            f"--resume: {flags.output_json} was measured with {', '.join(changed)}; install what it was, or name "
            "another file"
        )
    results = {"command": command, "date": str(date.today()), **card, "versions": versions, "rows": old["rows"]}
    for row in (row for row in rows if not is_done(row, results["rows"])):
        if flags.time_limit_s is not None and time.monotonic() - start > flags.time_limit_s:
            print(f"--time_limit_s {flags.time_limit_s:g} reached: skipping {row.name} and all later rows")
            break
        print(f"{row.name} ...", flush=True)
        limit = flags.row_limit_s
        if flags.time_limit_s is not None:
            limit = min(limit, flags.time_limit_s + start - time.monotonic())
        found = asdict(row) | measure(row, work, flags.tokenizer, limit, card)
        print(f"  {found.get('error') or found['tokens_per_second']}", flush=True)
        results["rows"] = [old for old in results["rows"] if Row(**key(old)).name != row.name] + [found]
        write_json(flags.output_json, results)
    print(table(results["rows"]))


def requested_rows(flags: argparse.Namespace) -> list[Row]:
    """The rows of --sizes x --lengths x --kinds, then those of --row, then those of --plan."""
    rows = [Row(*names) for names in product(flags.sizes, flags.lengths, flags.kinds)]
    for text in flags.row:
        if not re.fullmatch(r"[\w.-]+:\d+:\w+(:\d+)?", text):
            raise UserError(f"--row: {text!r} is not size:length:kind or size:length:kind:steps")
        rows.append(Row(*text.split(":")))
    if flags.plan and not flags.plan.is_file():
        raise UserError(f"--plan: there is no file {flags.plan}")
    if flags.plan:
        known = {item.name for item in fields(Row)}
        for entry in yaml.safe_load(flags.plan.read_text(encoding="utf-8")):
            if not {"size", "length", "kind"} <= set(entry) <= known:
                raise UserError(f"--plan: {entry} needs size, length and kind, and may have steps and overrides")
            rows.append(Row(**entry))
    if not rows:
        raise UserError("no rows: give --sizes, --lengths and --kinds, or --row, or --plan")
    return rows


def measure(row: Row, work: Path, tokenizer: str, limit_s: float, card: dict) -> dict:
    """Run `row` in its own process. Returns its speed and memory, or a one-line error."""
    model = work / row.size
    if not model.exists():
        in_a_process(make_model, row.size, tokenizer, work / f"{row.size}.part")
        (work / f"{row.size}.part").rename(model)  # so that a killed run leaves no incomplete model
    data = make_rows(work / "data", row.length, row.steps * row.rows_per_step)
    output, log = work / "runs" / row.name, work / "logs" / f"{row.name}.log"
    shutil.rmtree(output, ignore_errors=True)
    for folder in (output, log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    settings, command = command_of(row, model, data, output)
    shown = shlex.join(command).replace(sys.executable, "python").replace(f"{ROOT}/", "")
    base: dict[str, Any] = {"settings": settings, "command": shown, "date": str(date.today()), "commit": commit()}
    start = time.monotonic()
    offline = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    folder = ROOT if row.kind.startswith("ours") else output
    status = run(command, log, limit_s, folder, environment=offline)
    base["wall_seconds"] = round(time.monotonic() - start, 1)
    if status != 0:
        return base | {"error": failure(log.read_text(encoding="utf-8", errors="replace"), status, limit_s)}
    if row.kind.startswith("ours"):
        found, log_entries = read_training(output)
        found["losses"], found["gradient_norms"] = ([e[name] for e in log_entries] for name in ("loss", "grad_norm"))
    else:
        found = json.loads((output / "one.json").read_text())
    shutil.rmtree(output)
    flop, published = (row.rows_per_step * of(row.size, row.length, row.group) for of in (step_flop, published_flop))
    tokens = row.length * row.rows_per_step
    results = speed(tokens, row.steps, found, flop, card["matrix_tflops"], row.cards)
    if "error" not in results:
        results["mfu"] = mfu(published, results["step_seconds"], card["peak_tflops"], row.cards)
    return base | results


def make_rows(folder: Path, length: int, count: int) -> Path:
    """`count` lines {"text"} of at least `length` tokens: the standard library's source, repeated as needed."""
    file, size = folder / f"{length}x{count}.jsonl", 5 * length  # characters; LLaMA2 averages about 3 per token
    if not file.exists():
        text = "\n".join(split_library(default_library())[0].values())
        text *= size * count // len(text) + 1
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": text[i * size : (i + 1) * size]}) + "\n" for i in range(count)]
        file.write_text("".join(lines), encoding="utf-8")
    return file


def cards(count: int) -> list[str]:
    """Flags of DeepSpeed's launcher for `count` GPUs: it forgets CUDA_VISIBLE_DEVICES where it is given a number."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if visible == [""] or not all(name.isdigit() for name in visible):  # not by UUID, which --include does not know
        return ["--num_gpus", str(count)]
    if len(visible) < count:
        raise UserError(f"cards: {count}, but CUDA_VISIBLE_DEVICES shows {len(visible)}")
    return ["--include", f"localhost:{','.join(visible[:count])}"]


def command_of(row: Row, model: Path, data: Path, output: Path) -> tuple[dict, list[str]]:
    """(settings specific to this kind, command line); for ours_*, also writes the YAML."""
    if not row.kind.startswith("ours"):
        command = [sys.executable, str(ROOT / "script/performance/peers.py"), row.kind, "--model", str(model)]
        for name, value in {"data": data, "length": row.length, "output_json": output / "one.json"}.items():
            command += [f"--{name}", str(value)]
        for name, value in row.overrides.items():
            command += [f"--{name}", str(value)]
        return dict(row.overrides), command
    is_plain = row.kind.startswith("ours_python_")
    left_out = {"deepspeed"} if is_plain else set()
    recipe = RECIPE
    if not torch.cuda.is_available():  # for testing this script on a CPU
        recipe, left_out = RECIPE | {"optim": "adamw_torch"}, left_out | GPU_ONLY
    settings = OURS[row.kind.removeprefix("ours_").removeprefix("python_")]
    settings = {name: value for name, value in settings.items() if name not in left_out} | row.overrides
    values = recipe | settings
    values |= {"model_name_or_path": str(model), "train_file": str(data), "output_dir": str(output)}
    values |= {"max_seq_length": row.length, "model_max_length": max(row.length, 8192), "max_steps": row.steps}
    file = output.parent / f"{row.name}.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    port = str(free_port())
    launcher = ["deepspeed", *cards(row.cards), "--master_port", port]
    if is_plain:
        launcher = (
            [sys.executable]
            if row.cards == 1
            else ["torchrun", f"--nproc_per_node={row.cards}", f"--master_port={port}"]
        )
    program = "script/performance/train_by_heads.py" if row.kind.endswith("by_heads") else "train.py"
    return settings, [*launcher, program, "--train_args_file", str(file)]


if __name__ == "__main__":
    main()
