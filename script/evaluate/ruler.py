"""RULER: how well does a model use its context, and up to which length? Synthetic tasks, nothing is downloaded.

    python script/evaluate/ruler.py --peft_model output/RUN --lengths 4096 8192 16384 --samples 50 \\
        --output_json ruler.json --figure ruler.png
    python script/evaluate/ruler.py --base_model output/RUN-merged --tasks niah_single_1 vt --haystack books.jsonl
    torchrun --nproc_per_node 4 script/evaluate/ruler.py ...        # samples shared by 4 GPUs
    python script/evaluate/ruler.py ... --output_json ruler.json --resume       # goes on after an interruption

Needles in a haystack, variable tracking, common and frequent words, as published but for their wording and word lists
(component/evaluate/ruler_task.py). Each sample fills its length, room for the answer included. Decoding is greedy; the
score is the share of expected strings in the answer. The same seed gives the same samples.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import QUIET, check_at_least, exit_on_user_error, new_parser, parsed_first
from component.evaluate.flags import add_model_flags


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_model_flags(parser)
    lengths = "tokens of prompt and answer (default 4096 8192 16384 32768)"
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help=lengths)
    parser.add_argument("--samples", type=int, default=50, help="samples per task and length (default 50)")
    parser.add_argument("--tasks", nargs="+", help="names of tasks (default: all)")
    haystack = "texts for the tasks that hide needles in prose, field `text` (default: generated sentences)"
    parser.add_argument("--haystack", help=haystack)
    parser.add_argument("--seed", type=int, default=42, help="seed of the samples (default 42)")
    parser.add_argument("--batch_size", type=int, default=1, help="prompts answered at once (default 1)")
    template = "default: chat if the model was tuned on chats or its tokenizer has a chat template, else completion"
    parser.add_argument("--template", choices=["completion", "chat"], help=template)
    share = "of the mean at the shortest length, as a threshold of the effective length (default 0.8)"
    parser.add_argument("--share", type=float, default=0.8, help=share)
    parser.add_argument("--figure", help="PNG file for the heat map")
    parser.add_argument("--resume", action="store_true", help="keep what --output_json holds of an interrupted run")
    parser.add_argument("--quiet", **QUIET)
    return parser.parse_args()


import matplotlib

matplotlib.use("Agg")
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from component.checkpoint import read_record
from component.data.source import texts_fingerprint
from component.distributed.world import from_first, is_first_process, joined_processes, results_once
from component.error import UserError, first_line, nearest
from component.evaluate.figure import draw_tasks
from component.evaluate.model_spec import (
    ModelSpec,
    describe_model,
    files_read,
    hashes_of,
    load_model_spec,
    mind_context,
    model_config,
)
from component.evaluate.ruler import Answer, Trial, model_answer, report, run_cell, summary, table_of
from component.evaluate.ruler_file import HASHES, kept_trials, write_trials
from component.evaluate.ruler_prompt import COMPLETION, SampleMaker
from component.evaluate.ruler_task import TASKS
from component.evaluate.split import attend_across_processes, check_split
from component.inference.batch import check_rows
from component.inference.load import stop_after_answer
from component.loading import recorded_template, resolve_model
from component.rope import context_length
from component.storage.claim import claimed
from component.tokenizer import UNLIMITED, load_tokenizer


def check_flags(flags: argparse.Namespace) -> None:
    """Check the flags before anything is loaded; sorts the lengths and fills in the tasks."""
    if not flags.base_model and not flags.peft_model:
        raise UserError("--base_model: missing; name a model, or an adapter with --peft_model")
    check_at_least(flags, 1, "lengths", "samples", "batch_size", "context_size", "sequence_parallel_size")
    for name in flags.tasks or ():
        if name not in TASKS:
            raise UserError(f"--tasks: there is no {name}{nearest(name, TASKS)}; use some of {', '.join(TASKS)}")
    if not 0 < flags.share <= 1:
        raise UserError(f"--share: {flags.share:g}; use a share above 0, at most 1")
    if flags.resume and not flags.output_json:
        raise UserError("--resume: it goes on with what --output_json holds; name that file too")
    flags.tasks = [name for name in TASKS if name in (flags.tasks or TASKS)]
    flags.lengths = sorted(set(flags.lengths))


def chosen_template(asked: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """completion, or the chat template that the model was tuned with, or its tokenizer's own."""
    if asked is None:
        record = read_record(tokenizer.name_or_path)
        asked = "chat" if (record.get("template") if record else tokenizer.chat_template) else COMPLETION
    return COMPLETION if asked == COMPLETION else recorded_template(tokenizer)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_flags(flags)
    spec = ModelSpec(None, flags.base_model, flags.peft_model, flags.context_size)
    with joined_processes(flags.sequence_parallel_size):
        is_first = is_first_process()
        written = {"--output_json": [flags.output_json], "--figure": [flags.figure]} if is_first else {}
        resumed = [Path(flags.output_json)] if flags.resume else []
        read = {**files_read([spec]), "--haystack": [flags.haystack]}
        with claimed(written, read, overwrite=flags.overwrite, resumed=resumed):
            run(spec, flags)


def run(spec: ModelSpec, flags: argparse.Namespace) -> None:
    source = resolve_model(flags.base_model, flags.peft_model, "base_model", "peft_model").source
    config = model_config(spec)
    check_split(config, flags.lengths[-1], flags.sequence_parallel_size)
    if min(flags.batch_size, flags.samples) > 1:
        check_rows(config)
    tokenizer = load_tokenizer(source, UNLIMITED, field="base_model")
    template = chosen_template(flags.template, tokenizer)
    maker = SampleMaker(tokenizer, template, flags.seed, flags.haystack, flags.lengths[-1])
    cells = [(length, task) for length in flags.lengths for task in flags.tasks]
    for length, task in cells:
        maker.check(task, length, flags.samples)
    names = ("base_model", "peft_model", "context_size", "load_in_4bit", "dtype", "haystack", "seed", "samples")
    asked = {**{name: getattr(flags, name) for name in names}, "template": template}
    for name in ("base_model", "peft_model", "haystack"):
        asked[name] = same_place(asked[name])
    asked |= hashes_of(flags.base_model, flags.peft_model) | {
        "haystack_fingerprint": texts_fingerprint(flags.haystack, "--haystack")
    }
    kept = from_first(lambda: kept_trials(flags.output_json, asked, cells) if flags.resume else [])
    model = load_model_spec(spec, load_in_4bit=flags.load_in_4bit, dtype=flags.dtype)
    mind_context(config, flags.lengths[-1])
    if flags.sequence_parallel_size > 1:
        attend_across_processes(model)
    if template == "tokenizer":
        stop_after_answer(model, tokenizer)
    record = {"asked": asked, **describe_model(model, flags.load_in_4bit), "decoding": "greedy"}
    record |= {"lengths": flags.lengths, "tasks": flags.tasks, "batch_size": flags.batch_size}
    if is_first_process():
        shown = {**asked, **record}
        print("\n".join(f"{name:<14} {value}" for name, value in shown.items() if name not in HIDDEN), flush=True)
    start = time.monotonic()
    trials = measure(maker, model_answer(model, tokenizer), kept, record, flags)
    if is_first_process():
        finish(trials, record, time.monotonic() - start, context_length(model.config), flags)


# the table has them, or nobody reads them
HIDDEN = ("asked", "tasks", "lengths", *HASHES)


def same_place(path: str | None) -> str | None:
    """A path as it is from everywhere: a run may be resumed from another folder."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def measure(
    maker: SampleMaker, answer: Answer, kept: list[Trial], record: dict, flags: argparse.Namespace
) -> list[Trial]:
    """The trials of all processes, by length and task; the file is written after each length of a task.

    Args:
        kept: trials of an earlier run, in complete cells.
    """
    done = {(trial.length, trial.task) for trial in kept}
    cells = [(length, task) for length in flags.lengths for task in flags.tasks]
    trials = list(kept)
    waiting = [cell for cell in cells if cell not in done]
    disable = None if is_first_process() else True  # None: without a terminal
    with tqdm(total=len(cells) * flags.samples, initial=len(trials), unit="sample", disable=disable) as bar:
        for length, task in waiting:
            bar.set_description(f"{task} at {length} tokens")
            own: list[Trial] = []
            try:
                for batch in run_cell(maker, task, length, flags.samples, flags.batch_size, answer):
                    own += batch
                    bar.update(len(batch))
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"--lengths: {length} tokens do not fit into GPU memory ({first_line(error)}); use "
                    "--load_in_4bit, --batch_size 1, torchrun with --sequence_parallel_size, or shorter prompts"
                ) from error
            found = sorted(results_once(own), key=lambda trial: trial.sample)
            bar.update(len(found) - len(own))  # those of other processes
            trials += found
            if is_first_process() and flags.output_json:
                write_trials(flags.output_json, record, trials)
    return sorted(trials, key=lambda trial: cells.index((trial.length, trial.task)))


def finish(trials: list[Trial], record: dict, seconds: float, context: int, flags: argparse.Namespace) -> None:
    """Print, write and draw the results; `context`: the model's, in tokens."""
    scores = table_of(trials, flags.tasks, flags.lengths)
    found = summary(scores, flags.lengths, flags.share)
    print(report(scores, flags.tasks, flags.lengths, found), flush=True)
    if flags.output_json:
        result = {"scores": scores, **found, "seconds": round(seconds, 1)}
        write_trials(flags.output_json, {**record, **result}, trials)
    if flags.figure:
        draw_tasks(scores, flags.tasks, flags.lengths, context, flags.figure)


if __name__ == "__main__":
    main()
