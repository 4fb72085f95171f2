"""How good are the recipes on a real pretrained model? Trains and measures them one after the other; resumable.

    python script/experiment/real/run.py --base output/real/base --texts TEXTS --work output/real --rows all
    python script/experiment/real/run.py ... --rows ours paper --seeds 1 --time_limit_s 1500
    python script/experiment/real/run.py ... --rows ours --dry_run      # tokens and estimated hours, then it ends

TEXTS holds NAME-train and NAME-validation files of any kind that script/data reads (NAME: books, proof, ...); --other
names texts unlike those, to see whether short ability is kept. Each row of rows.py is `train.py` on a YAML, then
script/evaluate/evaluate.py over windows of several lengths, and ruler.py for some rows. Results:
WORK/results/ROW-SEED.json; rows that have one are skipped. The key tokens of LongPPL are found by the row trained with
full attention throughout, which therefore comes first; without it there is no LongPPL.
"""

import argparse
import json
import shutil
import sys
import time
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
    parser.add_argument("--windows", type=int, nargs="+", help="tokens per window (2048, 8192, 32768 and the length)")
    parser.add_argument("--samples", type=int, default=25, help="of each task of RULER and length; 0: no RULER (25)")
    parser.add_argument("--ruler_lengths", type=int, nargs="+", help="(4096, 8192 and the length)")
    parser.add_argument("--tokens_per_second", type=float, help="measured before, for the estimate of hours")
    parser.add_argument("--price", type=float, help="of an hour, for the estimate of costs")
    parser.add_argument("--time_limit_s", type=float, help="start no row after this many seconds")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, and end")
    return parser.parse_args()


import torch
import yaml
from huggingface_hub import snapshot_download

from component.error import UserError, nearest
from component.model import load_config
from component.rope import extend_context
from component.storage.claim import work_folder
from component.storage.hub import READ_SUFFIXES
from component.storage.result import hardware, origin, write_json
from script.experiment.real.rows import BASE_CONTEXT, FULL, RECIPE, Row, all_rows
from script.shared.program import execute, read_training

REFERENCE = "full-attention"  # the row that finds key tokens
HELD_OUT = 12  # pieces of each kind of text, each as long as a window and a bit more
SHORT = 2048  # tokens: window for texts unlike the training's


def requested_rows(flags: argparse.Namespace) -> list[tuple[Row, int]]:
    """(row, seed): the first seed of everything before any second one, and the row that finds key tokens first."""
    known = all_rows()
    names = list(known) if flags.rows == ["all"] else flags.rows
    for name in names:
        if name not in known:
            raise UserError(f"--rows: {name!r} is not in script/experiment/real/rows.py{nearest(name, known)}")
    pairs = [(known[name], seed) for name in names for seed in range(min(known[name].seeds, flags.seeds or 9))]
    return sorted(pairs, key=lambda pair: (pair[1], pair[0].name != REFERENCE))


def length_of(row: Row, flags: argparse.Namespace) -> int:
    return min(row.length, flags.length or row.length)


def steps_of(row: Row, flags: argparse.Namespace) -> int:
    return flags.max_steps or row.changes.get("max_steps", RECIPE["max_steps"])


def estimate(waiting: list[tuple[Row, int]], flags: argparse.Namespace) -> str:
    """What training will cost."""
    trained = [row for row, _ in waiting if row.program]
    accumulated = RECIPE["gradient_accumulation_steps"]
    tokens = sum(steps_of(row, flags) * accumulated * length_of(row, flags) for row in trained)
    line = f"{len(waiting)} rows, {len(trained)} of them trained on {tokens / 1e6:,.1f} M tokens"
    if not flags.tokens_per_second:
        return f"{line}; --tokens_per_second estimates hours"
    hours = tokens / flags.tokens_per_second / 3600
    cost = f", {hours * flags.price:,.2f} at {flags.price:g} an hour" if flags.price else ""
    return f"{line}: about {hours:.1f} hours{cost}, besides measuring"


def sources(flags: argparse.Namespace, kind: str) -> dict[str, str]:
    """{NAME: file} of the texts."""
    found = {file.name.partition(f"-{kind}.")[0]: str(file) for file in sorted(flags.texts.glob(f"*-{kind}.*"))}
    if not found:
        raise UserError(f"--texts: {flags.texts} holds no file NAME-{kind}.*")
    return found


def prepare_data(flags: argparse.Namespace, rows: list[Row]) -> None:
    """WORK/data: TEXTS.jsonl to train on, NAME.bin to measure on."""
    data, longest = flags.work / "data", max(length_of(row, flags) for row in rows)
    data.mkdir(parents=True, exist_ok=True)
    train = list(sources(flags, "train").values())
    for row in rows:
        length, output = length_of(row, flags), data / f"{row.texts}.jsonl"
        if row.program is None or output.exists():
            continue
        bounds = {"min_tokens": length + 1, "max_tokens": int(1.15 * length) + 64, "long_texts": "split"}
        if row.texts == "mixture":
            short = {"min_tokens": 64, "max_tokens": max(128, length // 16), "long_texts": "split"}
            kinds = [("long", 2, bounds), ("short", 1, short)]
            entries = [
                {"name": f"{kind} {at}", "path": path, "share": share, **lengths}
                for kind, share, lengths in kinds
                for at, path in enumerate(train)
            ]
            config = data / "mixture.yaml"
            config.write_text(yaml.safe_dump({"sources": entries}, sort_keys=False), encoding="utf-8")
            words = ["--config", str(config)]
        else:
            words = ["--source", *train, *(word for key, value in bounds.items() for word in (f"--{key}", str(value)))]
        build(flags, "build_pretrain.py", output, words)
    for name, path in sources(flags, "validation").items():
        pieces, output = data / f"held-out-{name}.jsonl", data / f"{name}.bin"
        if not output.exists():
            words = ["--min_tokens", str(longest + 1), "--max_tokens", str(int(1.15 * longest) + 64)]
            words += ["--num_samples", str(HELD_OUT), "--long_texts", "split", "--source", path]
            build(flags, "build_pretrain.py", pieces, words)
            build(flags, "tokenize_bin.py", output, ["--source", str(pieces)])
    if flags.other and not (data / "other.bin").exists():
        build(flags, "tokenize_bin.py", data / "other.bin", ["--source", *flags.other, "--text_key", flags.other_key])


def build(flags: argparse.Namespace, program: str, output: Path, words: list[str]) -> None:
    common = ["--tokenizer", str(flags.base), "--output", str(output), "--overwrite"]
    execute([f"script/data/{program}", *common, *words], flags.work / f"{output.name}.log")


def do(row: Row, seed: int, flags: argparse.Namespace) -> dict:
    """Train, measure and write the result of one row; what it trained is deleted."""
    start, folder = time.monotonic(), flags.work / "runs" / f"{row.name}-{seed}"
    result: dict[str, Any] = {"row": row.name, "label": row.label, "length": length_of(row, flags), "seed": seed}
    if row.program is None:
        words = ["--base_model", str(save_scaled(row, folder, flags) if row.rope_type else flags.base)]
    else:
        result |= train(row, seed, folder, flags)
        words = ["--base_model" if row.program == FULL else "--peft_model", str(folder)]
    result["perplexity"] = measure(row, folder, words, flags)
    if row.has_ruler and seed == 0 and flags.samples:
        lengths = sorted({*(flags.ruler_lengths or (4096, 8192)), length_of(row, flags)})
        output = folder.with_name(f"{folder.name}-ruler.json")
        more = [
            "--samples",
            str(flags.samples),
            "--output_json",
            str(output),
            "--overwrite",
            "--template",
            "completion",
        ]
        more += ["--lengths", *map(str, lengths)]
        execute(["script/evaluate/ruler.py", *words, *more], output.with_suffix(".log"))
        result["ruler"] = json.loads(output.read_text(encoding="utf-8"))
    result |= {"seconds": round(time.monotonic() - start, 1), **origin()}
    write_json(flags.work / "results" / f"{row.name}-{seed}.json", result)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def save_scaled(row: Row, folder: Path, flags: argparse.Namespace) -> Path:
    """Copy the base to `folder`, with scaled positions."""
    config = load_config(str(flags.base))
    extend_context(config, length_of(row, flags), str(row.rope_type), rope_theta=row.changes.get("rope_theta"))
    shutil.copytree(flags.base, folder, dirs_exist_ok=True)
    config.save_pretrained(folder)
    return folder


def train(row: Row, seed: int, folder: Path, flags: argparse.Namespace) -> dict:
    """Train; returns the YAML's settings, the contents of train_results.json, and [step, loss] pairs."""
    length, file = length_of(row, flags), folder.parent / f"{folder.name}.yaml"
    settings = RECIPE | {"max_seq_length": length, "model_max_length": length, "seed": seed}
    settings |= {"bf16": True} if torch.cuda.is_available() else {}
    settings |= row.changes | {"max_steps": steps_of(row, flags)}
    settings |= {"model_name_or_path": str(flags.base), "output_dir": str(folder)}
    settings |= {"train_file": str(flags.work / "data" / f"{row.texts}.jsonl")}
    if settings.get("position_skipping"):
        settings["max_seq_length"] = min(length // 2, BASE_CONTEXT)
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    assert row.program
    execute([row.program, "--train_args_file", str(file)], file.with_suffix(".log"))
    training, log_entries = read_training(folder)
    losses = [[entry["step"], entry["loss"]] for entry in log_entries]
    return {"settings": settings, "training": training, "losses": losses}


def measure(row: Row, folder: Path, words: list[str], flags: argparse.Namespace) -> dict:
    """{text: results of evaluate.py}; of texts unlike the training's at SHORT tokens alone."""
    windows = sorted({*(flags.windows or (SHORT, 8192, 32768)), length_of(row, flags)})
    windows = [tokens for tokens in windows if tokens <= max(length_of(row, flags), 32768)]
    found = {}
    for file in sorted((flags.work / "data").glob("*.bin")):
        output = folder.with_name(f"{folder.name}-{file.stem}.json")
        lengths = [min(SHORT, *windows)] if file.stem == "other" else windows
        more = ["--data_path", str(file), "--output_json", str(output), "--overwrite", "--seq_len", *map(str, lengths)]
        more += [] if file.stem == "other" else key_token_flags(row, file.stem, flags)
        execute(["script/evaluate/evaluate.py", *words, *more], output.with_suffix(".log"))
        found[file.stem] = json.loads(output.read_text(encoding="utf-8"))["results"]
    return found


def key_token_flags(row: Row, text: str, flags: argparse.Namespace) -> list[str]:
    """The flags for LongPPL; none before the key tokens are found, or with other windows than theirs."""
    length, file = length_of(row, flags), flags.work / "data" / f"keys-{text}.json"
    is_found = row.name == REFERENCE or file.exists()
    if not is_found or length != length_of(all_rows()[REFERENCE], flags):
        return []
    context, stride = min(4096, length // 4), min(1024, length // 16)  # published, from 16384 tokens on
    rule = ["--long_ppl_context", str(context), "--long_ppl_stride", str(stride)]
    return ["--long_ppl", "true", "--key_tokens", str(file), *rule]


@exit_on_user_error
def main() -> None:
    flags, start = parse_flags(), time.monotonic()
    check_at_least(flags, 1, "seeds", "max_steps", "length", "windows", "ruler_lengths")
    check_at_least(flags, 0, "samples")
    flags.work = flags.work.resolve()
    if not Path(flags.base).is_dir():
        flags.base = snapshot_download(flags.base, allow_patterns=[f"*{suffix}" for suffix in READ_SUFFIXES])
    flags.base = Path(flags.base).resolve()  # programs run from the repository root
    flags.texts = flags.texts.resolve()
    flags.other = [str(Path(file).resolve()) for file in flags.other]
    rows = requested_rows(flags)
    waiting = [(row, seed) for row, seed in rows if not (flags.work / "results" / f"{row.name}-{seed}.json").exists()]
    print(f"{estimate(waiting, flags)}; on {hardware()}", flush=True)
    if flags.dry_run or not waiting:
        return
    read = {"--base": [flags.base], "--texts": [flags.texts]}
    with work_folder(flags.work / "runs", "run.py", read):
        (flags.work / "results").mkdir(exist_ok=True)
        prepare_data(flags, [row for row, _ in waiting])
        for row, seed in waiting:
            if flags.time_limit_s is not None and time.monotonic() - start > flags.time_limit_s:
                print(f"{row.name}-{seed} and later rows: skipped, --time_limit_s reached")
                break
            print(f"{row.name}-{seed}: {do(row, seed, flags)['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
