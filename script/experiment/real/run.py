"""How good are the recipes on a real pretrained model? Trains and measures them, on one or several GPUs; resumable.

    python script/experiment/real/run.py --base output/real/base --texts TEXTS --work output/real --rows all
    python script/experiment/real/run.py ... --rows ours paper --seeds 1 --time_limit_s 1500
    python script/experiment/real/run.py ... --rows all --jobs 4        # on 4 GPUs, a row on each
    python script/experiment/real/run.py ... --rows ours --dry_run      # tokens and estimated hours, then it ends

TEXTS holds NAME-train and NAME-validation files of any kind that script/data reads (NAME: books, proof, ...); --other
names texts unlike those, to see whether short ability is kept. Each row of rows.py is `train.py` on a YAML, then
script/evaluate/evaluate.py over windows of several lengths, and ruler.py for some rows. Results:
WORK/results/ROW-SEED.json; rows that have one are skipped, and other texts, lengths or windows need another WORK. The
key tokens of LongPPL are found by the row trained with full attention throughout, which therefore comes first; without
it there is no LongPPL.
"""

import argparse
import itertools
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from component.cli import check_at_least, exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--base", required=True, help="folder or hub id of the model to extend")
    parser.add_argument("--texts", type=Path, required=True, help="folder of NAME-train.* and NAME-validation.* files")
    parser.add_argument("--other", nargs="+", default=[], help="files unlike the training's, measured at 2048 tokens")
    parser.add_argument("--other_key", default="text", help="key of their text (text)")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and results")
    parser.add_argument("--rows", nargs="+", required=True, help="names from rows.py, or all")
    parser.add_argument("--seeds", type=int, help="at most this many per row (default: as in rows.py)")
    parser.add_argument("--max_steps", type=int, help="train for fewer steps, for a quick test")
    parser.add_argument("--length", type=int, help="extend to fewer tokens, for a quick test")
    parser.add_argument("--windows", type=int, nargs="+", help="tokens per window (2048, 8192; and the length)")
    parser.add_argument("--samples", type=int, default=25, help="of each task of RULER and length; 0: no RULER (25)")
    parser.add_argument("--ruler_lengths", type=int, nargs="+", help="(4096, 8192 and the length)")
    parser.add_argument("--tokens_per_second", type=float, help="measured before, for the estimate of hours")
    parser.add_argument("--price", type=float, help="of an hour, for the estimate of costs")
    parser.add_argument("--ruler_batch_size", type=int, default=1, help="prompts answered at once (1)")
    at_once = "of windows that are measured at once (32768)"
    parser.add_argument("--tokens_at_once", type=int, default=32768, help=at_once)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, on the visible GPUs in turn (1)")
    parser.add_argument("--keep", nargs="+", default=[], help="rows whose first seed is kept, in WORK/runs")
    parser.add_argument("--time_limit_s", type=float, help="start no row after this many seconds")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, and end")
    return parser.parse_args()


from huggingface_hub import snapshot_download

from component.error import UserError, nearest
from component.storage.claim import work_folder
from component.storage.foreign import reading
from component.storage.hub import READ_SUFFIXES, check_source
from component.storage.result import hardware, write_json
from script.experiment.real.data import prepare_data, sources
from script.experiment.real.rows import Row, all_rows
from script.experiment.real.schedule import Schedule
from script.experiment.real.work import REFERENCE, Trained, Worker, result_file, tokens_of
from script.shared.card import visible_gpus
from script.shared.same_work import same_work

FLAGS_FILE = "flags.json"  # of WORK
# flags that decide what is in WORK/data and WORK/results
OF_RESULTS = ("other_key", "max_steps", "length", "windows", "samples", "ruler_lengths")


def requested_rows(flags: argparse.Namespace) -> list[tuple[Row, int]]:
    """(row, seed): first seeds before second ones; first the row that finds the others' key tokens."""
    known = all_rows()
    names = list(known) if flags.rows == ["all"] else flags.rows
    for flag, given in (("rows", names), ("keep", flags.keep)):
        for name in given:
            if name not in known:
                raise UserError(f"--{flag}: {name!r} is not in script/experiment/real/rows.py{nearest(name, known)}")
    pairs = [(known[name], seed) for name in names for seed in range(min(known[name].seeds, flags.seeds or 9))]
    return sorted(pairs, key=lambda pair: (pair[1], (pair[0].name, pair[1]) != REFERENCE))


def estimate(waiting: list[tuple[Row, int]], flags: argparse.Namespace) -> str:
    """What training will cost."""
    trained = [row for row, _ in waiting if row.program]
    tokens = sum(tokens_of(row, flags) for row in trained)
    line = f"{len(waiting)} rows, {len(trained)} of them trained on {tokens / 1e6:,.1f} M tokens"
    if not flags.tokens_per_second:
        return f"{line}; --tokens_per_second estimates hours"
    hours = tokens / flags.tokens_per_second / 3600
    cost = f", {hours * flags.price:,.2f} at {flags.price:g} an hour" if flags.price else ""
    return f"{line}: about {hours:.1f} hours of a GPU{cost}, besides measuring"


def check_flags(flags: argparse.Namespace) -> None:
    """Check numbers, find the base, and make paths absolute: programs run from the repository root."""
    names = ("seeds", "max_steps", "length", "windows", "ruler_lengths", "ruler_batch_size", "tokens_at_once", "jobs")
    check_at_least(flags, 1, *names)
    check_at_least(flags, 0, "samples")
    for name in ("tokens_per_second", "price"):
        value = getattr(flags, name)
        if value is not None and not value > 0:  # NaN too
            raise UserError(f"--{name}: {value:g}; use a number above 0")
    check_source(flags.base, "--base")
    if not Path(flags.base).is_dir():
        with reading(f"--base: {flags.base!r} can't be read", "name a folder, or check the hub id and the network"):
            flags.base = snapshot_download(flags.base, allow_patterns=[f"*{suffix}" for suffix in READ_SUFFIXES])
    flags.work, flags.base, flags.texts = (Path(path).resolve() for path in (flags.work, flags.base, flags.texts))
    flags.other = [str(Path(file).resolve()) for file in flags.other]
    if flags.other and "other" in {**sources(flags.texts, "train"), **sources(flags.texts, "validation")}:
        raise UserError("--texts: a kind of text is called other, as those of --other are; rename its files")


def check_same_work(flags: argparse.Namespace) -> dict[str, Any]:
    """Refuse a --work of other flags, base or texts; what a row changes, and how it is computed, is left out.

    Returns:
        What to write into FLAGS_FILE of WORK.
    """
    found = {kind: sources(flags.texts, kind) for kind in ("train", "validation")}
    named: dict[str, Any] = {"base": Path(flags.base).name, "texts": sorted({*found["train"], *found["validation"]})}
    named["other"] = [Path(file).name for file in flags.other]
    files = {"base": flags.base} | {f"other {at}": file for at, file in enumerate(flags.other, 1)}
    files |= {f"{kind} {name}": file for kind in found for name, file in found[kind].items()}
    return same_work(flags.work / FLAGS_FILE, named | {name: getattr(flags, name) for name in OF_RESULTS}, files)


def do_all(waiting: list[tuple[Row, int]], flags: argparse.Namespace, start: float) -> None:
    """Do the rows, --jobs at a time, on the visible GPUs in turn; `start`: from when --time_limit_s counts."""
    limit = float("inf") if flags.time_limit_s is None else start + flags.time_limit_s
    schedule: Schedule[tuple[Row, int], Trained] = Schedule(waiting, lambda: time.monotonic() < limit)
    gpus, failures = visible_gpus(), list[str]()
    worker = Worker(flags, -(-min(flags.jobs, len(waiting)) // max(1, len(gpus))))
    if REFERENCE not in [(row.name, seed) for row, seed in waiting]:
        schedule.keys_known()

    def fail(row: Row, seed: int, error: Exception) -> None:  # the other rows continue
        failures.append(f"{row.name}-{seed}")
        if not isinstance(error, UserError):
            traceback.print_exception(error)
        print(f"{row.name}-{seed}: {error}", flush=True)

    def train(row: Row, seed: int) -> None:
        try:
            trained = worker.prepare(row, seed)
            schedule.trained(trained, finds_keys=trained.finds_keys)
        except Exception as error:
            fail(row, seed, error)
            schedule.failed()
            if (row.name, seed) == REFERENCE:
                schedule.keys_known()

    def measure(trained: Trained) -> None:
        try:
            result = worker.finish(trained, schedule.keys_known)
            print(f"{trained.row.name}-{trained.seed}: {result['seconds']} s", flush=True)
        except Exception as error:
            fail(trained.row, trained.seed, error)

    def work(gpu: str | None) -> None:
        worker.gpu.name = gpu
        while (item := schedule.take()) is not None:
            pair, trained = item
            if pair is not None:
                train(*pair)
            elif trained is not None:
                measure(trained)

    names = itertools.cycle(gpus or [None])
    with ThreadPoolExecutor(flags.jobs) as pool:
        threads = [pool.submit(work, next(names)) for _ in range(flags.jobs)]
        try:
            for thread in threads:
                thread.result()
        finally:  # by Ctrl-C: else every other row would still be started
            schedule.stop()
    for row, seed in schedule.waiting:
        print(f"{row.name}-{seed}: skipped, --time_limit_s reached")
    if failures:
        raise UserError(f"{len(failures)} rows failed: {', '.join(failures)}; see their logs in {flags.work}/runs")


@exit_on_user_error
def main() -> None:
    flags, start = parse_flags(), time.monotonic()
    check_flags(flags)
    record = check_same_work(flags)
    rows = requested_rows(flags)
    waiting = [(row, seed) for row, seed in rows if not result_file(row, seed, flags).exists()]
    print(f"{estimate(waiting, flags)}; {flags.jobs} at a time on {hardware()}", flush=True)
    if flags.dry_run or not waiting:
        return
    read = {"--base": [flags.base], "--texts": [flags.texts]}
    with work_folder(flags.work / "runs", "run.py", read):
        write_json(flags.work / FLAGS_FILE, record)
        (flags.work / "results").mkdir(exist_ok=True)
        prepare_data(flags, [row for row, _ in waiting])
        do_all(waiting, flags, start)


if __name__ == "__main__":
    main()
