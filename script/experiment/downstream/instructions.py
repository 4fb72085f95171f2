"""How much does long instruction tuning lower an extended model's loss on answers about held-out documents?

    python script/experiment/downstream/instructions.py --base output/experiment/passkey/extended \\
        --short_base output/experiment/base --source sft_long.jsonl.xz --work output/experiment/instructions \\
        --output_json figure/experiment_instructions.json

build_sft.py keeps the samples that fit the model's context. Records that share a line of 60 characters or more are
about the same document, and a document is on one side of the split only. --short_base adds a control: the same tuning
at that model's own context, with questions truncated on the left and the same answers, token for token.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the extended model, merged by merge_lora.py")
    parser.add_argument("--short_base", type=Path, help="the model before extension, for a control")
    parser.add_argument("--source", type=Path, required=True, help='a file of {"input", "output"} records')
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and logs")
    parser.add_argument("--held_out", type=float, default=0.2, help="share of the samples to hold out (0.2)")
    parser.add_argument("--per_document", type=int, default=10, help="maximum questions per document (10)")
    parser.add_argument("--max_answer_tokens", type=int, default=512, help="drop samples with longer answers (512)")
    short = "held-out questions with answers of at most this many tokens are also answered, and compared (16)"
    parser.add_argument("--short_answer_tokens", type=int, default=16, help=short)
    parser.add_argument("--epochs", type=float, default=3.0, help="(3)")
    parser.add_argument("--max_steps", type=int, default=-1, help="train for fewer steps, for a quick test")
    parser.add_argument("--samples_per_step", type=int, default=4, help="(4)")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="(3e-4)")
    parser.add_argument("--seed", type=int, default=42, help="of split and training (42)")
    parser.add_argument("--jobs", type=int, default=1, help="models tuned and measured at a time (1)")
    parser.add_argument("--output_json", required=True, help="file for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args()


import yaml
from transformers import PreTrainedTokenizerBase

from component.data import IGNORE_INDEX
from component.data.chat_template import Turns, encode_conversation
from component.data.source import RecordTally, read_records
from component.error import UserError
from component.loading import recorded_template
from component.model import load_config
from component.rope import context_length
from component.storage.result import origin, write_json
from component.tokenizer import UNLIMITED, load_tokenizer
from script.experiment.downstream.answers import answers
from script.experiment.downstream.split import Record, documents, split
from script.experiment.downstream.tuning import check_flags, held, tune
from script.shared.program import execute, in_a_process


def check(flags: argparse.Namespace) -> None:
    if not 0 < flags.held_out < 1:
        raise UserError(f"--held_out: {flags.held_out}; use a share between 0 and 1")
    counts = ("per_document", "max_answer_tokens", "short_answer_tokens", "samples_per_step", "jobs")
    folders = ("base", "short_base", "source", "work")
    check_flags(flags, counts=counts, folders=folders)


def fitting_samples(flags: argparse.Namespace, context: int, template: str) -> tuple[list[Record], dict[str, int]]:
    """The samples of the source that fit `context` tokens in `template` by build_sft.py, and its counts."""
    config, output = flags.work / "sources.yaml", flags.work / "fitting.jsonl"
    source = {"name": flags.source.name, "path": str(flags.source), "mapping": "input_output"}
    config.write_text(yaml.safe_dump({"sources": [source]}), encoding="utf-8")
    words = ["--config", config, "--tokenizer", flags.base, "--output", output, "--max_tokens", context, "--overwrite"]
    words += ["--seed", flags.seed, "--template", template]
    execute(["script/data/build_sft.py", *map(str, words)], flags.work / "build_sft.log")
    counts = json.loads(output.with_suffix(".stats.json").read_text(encoding="utf-8"))["counts"]
    return [record for _, record in RecordTally().good(output, read_records(output, ("input", "output")))], counts


def lengths(tokenizer: PreTrainedTokenizerBase, record: Record) -> tuple[int, int]:
    """(tokens of a sample, tokens of its answer)."""
    turns: Turns = [(record["input"], record["output"])]
    ids, labels = encode_conversation(tokenizer, turns, None, recorded_template(tokenizer))
    return len(ids), sum(label != IGNORE_INDEX for label in labels)


def end_of_question(tokenizer: PreTrainedTokenizerBase, record: Record, context: int) -> Record:
    """The sample with its question truncated on the left to fit `context` tokens in all.

    Raises:
        UserError: the answer and the template leave no room for a question.
    """
    starts = [start for start, _ in tokenizer(record["input"], return_offsets_mapping=True).offset_mapping]
    cut, excess = record, lengths(tokenizer, record)[0] - context
    dropped = 0
    while excess > 0:
        dropped += excess
        if dropped >= len(starts):
            _, answer = lengths(tokenizer, record)
            raise UserError(
                f"--max_answer_tokens: an answer of {answer} tokens leaves no room for its question in a context of "
                f"{context}; use fewer"
            )
        cut = record | {"input": record["input"][starts[dropped] :]}
        excess = lengths(tokenizer, cut)[0] - context
    return cut


def write_side(file: Path, records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Write a JSONL file for train.py and count its samples and tokens."""
    counts = {"samples": 0, "tokens": 0, "answer_tokens": 0}
    with file.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            for name, number in zip(counts, (1, *lengths(tokenizer, record)), strict=True):
                counts[name] += number
    return counts


def instruct(name: str, model: Path, sides: dict[str, list[Record]], flags: argparse.Namespace) -> dict[str, Any]:
    """Tune `model` at its own context in WORK/NAME. Returns counts of the data, loss before and after, and the run."""
    context, tokenizer = context_length(load_config(str(model), "--base")), load_tokenizer(str(model), UNLIMITED)
    files = {side: flags.work / f"{name}-{side}.jsonl" for side in sides}
    cut = {side: [end_of_question(tokenizer, record, context) for record in sides[side]] for side in sides}
    counts = {side: write_side(files[side], cut[side], tokenizer) for side in sides}
    asked = [record for record in cut["held_out"] if lengths(tokenizer, record)[1] <= flags.short_answer_tokens]
    before = in_a_process(answers, model, None, asked, flags.short_answer_tokens)
    run = tune(
        flags.work / name,
        model_name_or_path=str(model),
        train_file=str(files["train"]),
        eval_file=str(files["held_out"]),
        template=recorded_template(tokenizer),
        eval_on_start=True,
        max_seq_length=context,
        model_max_length=context,
        use_shift_short_attention=name == "extended",
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=flags.samples_per_step,
        num_train_epochs=flags.epochs,
        max_steps=flags.max_steps,
        learning_rate=flags.learning_rate,
        seed=flags.seed,
    )
    after = in_a_process(answers, model, flags.work / name, asked, flags.short_answer_tokens)
    losses = {"loss_before": run["eval_losses"][0][1], "loss_after": run["eval_losses"][-1][1]}
    expected = [record["output"] for record in asked]
    short = {"short_answers": {"before": before, "after": after, "expected": expected}}
    result = {"context_tokens": context, "data": counts, **losses, **short, **run}
    write_json(flags.work / f"{name}.json", result)  # here already if another model fails
    change = f"{losses['loss_before']:.3f} -> {losses['loss_after']:.3f} nats per token of held-out answers"
    right = f"{before['exact']} -> {after['exact']} of {before['questions']} short answers exact"
    print(f"{name}, {context} tokens: {change}; {right}", flush=True)
    return result


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check(flags)
    with held(flags, "instructions.py", "output_json"):
        compare(flags)


def compare(flags: argparse.Namespace) -> None:
    context = context_length(load_config(str(flags.base), "--base"))
    tokenizer = load_tokenizer(str(flags.base), UNLIMITED)
    records, counts = fitting_samples(flags, context, recorded_template(tokenizer))
    kept = [record for record in records if lengths(tokenizer, record)[1] <= flags.max_answer_tokens]
    groups = [group[: flags.per_document] for group in documents(kept)]
    chosen = split(groups, flags.held_out, flags.seed)
    sides = {side: [record for group in groups for record in group] for side, groups in chosen.items()}
    counts = {key: counts[key] for key in ("read", "too_long", "duplicates")}
    counts |= {"answer_too_long": len(records) - len(kept), "one_of_many": len(kept) - sum(map(len, groups))}
    counts |= {f"{side}_documents": len(found) for side, found in chosen.items()}
    models = {"extended": flags.base} | ({"short": flags.short_base} if flags.short_base else {})
    print(counts, flush=True)
    with ThreadPoolExecutor(min(flags.jobs, len(models))) as pool:
        jobs = {name: pool.submit(instruct, name, model, sides, flags) for name, model in models.items()}
        results = {name: job.result() for name, job in jobs.items()}
    write_json(flags.output_json, {"seed": flags.seed, "source": counts, "models": results, **origin()})


if __name__ == "__main__":
    main()
