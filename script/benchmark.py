"""How fast is training with LongQLoRA and with the alternatives, and in how much memory, on one or more GPUs?

    python script/benchmark.py --work /tmp/work --tokenizer LLAMA2_TOKENIZER --sizes 7b --lengths 8192 32768 \\
        --kinds ours_fastest ours_leanest unsloth hf original --output_json figure/benchmark.json
    python script/benchmark.py ... --row 7b:131072:ours_fastest --row 7b:131072:unsloth:3 --time_limit_s 500 --resume
    python script/benchmark.py ... --plan rows.json  # [{"size", "length", "kind", "steps", "overrides", "cards"}, ...]

Each row (size, length, kind) runs in its own process on a random-weight model; results are rewritten after each row.
ours_* is `deepspeed train.py` with the settings in OURS (by_heads: another program, for several cards); ours_python_*
is `python train.py` without DeepSpeed; the other kinds are baselines in script/performance/peers.py. `overrides` are
keys of train.py's YAML (for a baseline: memory_budget_gib). On several `cards`, ours_* trains one row per card, or
splits rows with the override sequence_parallel_size; ours_python_* is then torchrun, and memory is that of the card
with the most. All kinds: batch size 1, no gradient accumulation, rank 64 on all linear layers, NF4 with double
quantization, no dropout, gradient clipping.
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
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from component.cli import exit_on_user_error, new_parser, parsed_first
from script.performance.peers import PEERS
from script.shared.shape import SHAPES

RECIPE = {
    "sft": False,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "optim": "paged_adamw_32bit",
    "weight_decay": 0.0,
    "max_grad_norm": 0.3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "overwrite_output_dir": True,
}
ON_CARD = "./train_args/deepspeed/deepspeed_config_s2_no_offload.json"
ON_HOST = "./train_args/deepspeed/deepspeed_config_s2.json"
MINIMUM_MEMORY = {
    "keep_layers": 0,
    "keep_attention_layers": 0,
    "keep_attention_output": False,
    "offload_activations": True,
    "mlp_tile_tokens": 2048,
    "loss_chunk_tokens": 1024,
}
OURS = {
    "fastest": {"bf16": True, "memory_budget_gib": 32, "deepspeed": ON_CARD},
    "leanest": {"bf16": True, "memory_budget_gib": 32, "deepspeed": ON_HOST, **MINIMUM_MEMORY},
    "v100": {
        "fp16": True,
        "use_flash_attn": False,
        "use_liger_kernel": False,
        "memory_budget_gib": 10,
        "deepspeed": ON_CARD,
    },
    "by_heads": {"bf16": True, "memory_budget_gib": 32, "deepspeed": ON_CARD},
    "off": {"bf16": True, "memory_plan": False, "gradient_checkpointing": True, "deepspeed": ON_CARD},
}
KINDS = [*(f"ours_{name}" for name in OURS), *(f"ours_python_{name}" for name in OURS), *PEERS]


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

from component.error import UserError, nearest
from component.storage.claim import held_result, work_folder
from component.storage.result import LIBRARIES, library_versions, write_json
from script.performance.report import commit, failure, read_results, speed, step_flop, table
from script.shared.card import describe_card
from script.shared.program import free_port, in_a_process, read_training, run
from script.shared.random_model import make_model
from script.shared.stdlib import default_library, split_library

GPU_ONLY = {"bf16", "fp16", "memory_budget_gib", "use_flash_attn", "use_liger_kernel"}


@dataclass
class Row:
    size: str
    length: int  # tokens
    kind: str
    steps: int = 0  # the first is warm-up; 0: 3 or 4, enough for a median
    overrides: dict = field(default_factory=dict)
    cards: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (("size", self.size, SHAPES), ("kind", self.kind, KINDS)):
            if value not in known:
                raise UserError(f"{name}: {value!r} is none of {', '.join(known)}{nearest(str(value), known)}")
        parts = self.overrides.get("sequence_parallel_size", 1)
        if not (isinstance(self.cards, int) and isinstance(parts, int) and self.cards >= parts >= 1):
            raise UserError(f"cards: {self.cards!r}; use a number of at least 1 and of sequence_parallel_size")
        if self.cards % parts:
            raise UserError(f"cards: {self.cards}; use a multiple of sequence_parallel_size, {parts}")
        if self.cards > 1 and self.kind in PEERS:
            raise UserError(f"cards: {self.cards}; {self.kind} runs on one")
        self.length = int(self.length)
        self.steps = int(self.steps) or (4 if self.length <= 65536 else 3)
        if self.kind in PEERS and set(self.overrides) - {"memory_budget_gib"}:
            raise UserError(f"overrides: {self.overrides}; {self.kind} takes memory_budget_gib alone")

    @property
    def group(self) -> int | None:
        """Group size of S2-Attn in tokens; None with full attention."""
        has_groups = self.kind == "original" or self.kind.startswith("ours")
        if not (has_groups and self.overrides.get("use_shift_short_attention", True)):
            return None
        return self.overrides.get("group_size") or self.length // 4

    @property
    def rows_per_step(self) -> int:
        return self.cards // self.overrides.get("sequence_parallel_size", 1)

    @property
    def name(self) -> str:
        """Identifies the measurement: rows with the same name are the same; also the name of its files."""
        words = [self.size, self.length, self.kind, *(f"{k}={v}" for k, v in sorted(self.overrides.items()))]
        words += [f"{self.cards}-cards"] if self.cards > 1 else []
        return re.sub(r"[^\w.=-]+", "_", "-".join(map(str, words)))


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
    results = {"command": command, "date": str(date.today()), **card, "versions": versions, "rows": old["rows"]}
    for row in (row for row in rows if not is_done(row, results["rows"])):
        if flags.time_limit_s is not None and time.monotonic() - start > flags.time_limit_s:
            print(f"--time_limit_s {flags.time_limit_s:g} reached: skipping {row.name} and all later rows")
            break
        print(f"{row.name} ...", flush=True)
        limit = flags.row_limit_s
        if flags.time_limit_s is not None:
            limit = min(limit, flags.time_limit_s + start - time.monotonic())
        found = asdict(row) | measure(row, work, flags.tokenizer, limit, card["matrix_tflops"])
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


def measure(row: Row, work: Path, tokenizer: str, limit_s: float, matrix_tflops: float | None) -> dict:
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
    flop = row.rows_per_step * step_flop(row.size, row.length, row.group)
    return base | speed(row.length * row.rows_per_step, row.steps, found, flop, matrix_tflops, row.cards)


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
    launcher = ["deepspeed", "--num_gpus", str(row.cards), "--master_port", port]
    if is_plain:
        launcher = (
            [sys.executable]
            if row.cards == 1
            else ["torchrun", f"--nproc_per_node={row.cards}", f"--master_port={port}"]
        )
    program = "script/performance/train_by_heads.py" if row.kind.endswith("by_heads") else "train.py"
    return settings, [*launcher, program, "--train_args_file", str(file)]


def key(found: dict) -> dict:
    return {name: found[name] for name in ("size", "length", "kind", "overrides", "cards") if name in found}


def is_done(row: Row, found: list[dict]) -> bool:
    """Whether `row` was measured or ran out of memory. Rows with other errors are retried."""
    return any(
        Row(**key(old)).name == row.name and ("error" not in old or "out of memory" in old["error"].lower())
        for old in found
    )


if __name__ == "__main__":
    main()
