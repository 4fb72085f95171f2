"""Build an instruction mixture: deduplicated examples that fit, from several data sets in configured shares.

    python script/data/build_sft.py --config script/data/sft_sources.yaml --tokenizer lmsys/vicuna-13b-v1.5 \\
        --output data/sft.jsonl --max_tokens 8192 --seed 42

Beside FILE.jsonl, for train_file: FILE.stats.json (what was read, excluded and sampled from each source, and lengths)
and FILE.png (the length distribution of each source). An interrupted run resumes where it stopped.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first
from component.corpus.flags import add_common_flags, check_common_flags
from component.data import TEMPLATES


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML of the sources; see sft_sources.yaml")
    add_common_flags(parser)
    parser.add_argument("--max_tokens", type=int, default=8192, help="longest example, chat template included (8192)")
    template = "chat template of training: vicuna, or tokenizer for the model's own (vicuna)"
    parser.add_argument("--template", choices=TEMPLATES, default="vicuna", help=template)
    parser.add_argument("--seed", type=int, default=42, help="of the sample and its order (42)")
    return parser.parse_args()


from transformers import PreTrainedTokenizerBase

from component.corpus.length import describe_lengths
from component.corpus.mixture import Mixture, lost_shares, read_mixture
from component.corpus.output import (
    claimed_output,
    journal_path,
    measure_files,
    open_tokenizer,
    origin,
    statistics_paths,
    write_statistics,
)
from component.corpus.scan import Scan, SourceFile
from component.corpus.sft import Example, ExampleMeasure, choose_examples, write_examples
from component.data.chat_template import check_template
from component.error import UserError
from component.storage.atomic import atomic_file
from component.tokenizer import tokenizer_hash

REASONS = ("too_short", "too_long", "empty", "filtered")


def statistics(scan: Scan, mixture: Mixture, examples: list[Example], summary: list[dict]) -> dict:
    sources = []
    for group, source in enumerate(mixture.sources):
        counts = [count for file, count in zip(scan.files, scan.counts, strict=True) if file.group == group]
        noted = sum((count.noted for count in counts), Counter())
        kept = sum(count.kept for count in counts)
        lengths = [example.tokens for example in examples if scan.files[example.file].group == group]
        sources.append(
            {
                "name": source.name,
                "files": [{"file": str(file), "bytes": file.stat().st_size} for file in source.files],
                "mapping": source.mapping,
                "share": source.share,
                "count": source.count,
                "read": sum(count.read for count in counts),
                "bad": sum(count.bad for count in counts),
                **{reason: noted[reason] for reason in REASONS},
                "duplicates": kept - summary[group]["available"],
                **summary[group],
                "lengths": describe_lengths(lengths),
            }
        )
    names = ("read", "bad", *REASONS, "duplicates", "available", "sampled")
    return {
        "counts": {name: sum(source[name] for source in sources) for name in names},
        "sources": sources,
        "lengths": describe_lengths([example.tokens for example in examples]),
    }


def report(stats: dict, mixture: Mixture) -> str:
    lines = []
    for source, asked in zip(stats["sources"], mixture.sources, strict=True):
        dropped = ", ".join(f"{name.replace('_', ' ')} {source[name]:,}" for name in ("bad", *REASONS, "duplicates"))
        lack = f"; {asked.count:,} asked for" if asked.count and asked.count > source["sampled"] else ""
        lines.append(f"{source['name']}: {source['sampled']:,} of {source['read']:,} read ({dropped}{lack})")
    return "\n".join(lines)


def measure(flags: argparse.Namespace, mixture: Mixture, tokenizer: PreTrainedTokenizerBase) -> tuple[Scan, str]:
    files = [SourceFile(file, group=group) for group, source in enumerate(mixture.sources) for file in source.files]
    rules = [[source.name, source.mapping, source.turns, source.filters] for source in mixture.sources]
    settings = {"program": "build_sft", "max_tokens": flags.max_tokens, "template": flags.template, "sources": rules}
    own = str(tokenizer.chat_template) if flags.template == "tokenizer" else None  # lengths depend on it
    settings |= {"tokenizer": tokenizer_hash(tokenizer), "chat_template": own}
    return measure_files(flags, files, settings, ExampleMeasure(tokenizer, mixture, flags.max_tokens, flags.template))


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_common_flags(flags, "max_tokens")
    mixture = read_mixture(flags.config)
    sources = [file for source in mixture.sources for file in source.files]
    with claimed_output(flags, statistics_paths(flags.output), sources, journal_path(flags.output)):
        build(flags, mixture)


def build(flags: argparse.Namespace, mixture: Mixture) -> None:
    tokenizer = open_tokenizer(flags)
    if flags.template == "tokenizer":
        check_template(tokenizer)
    print(
        f"{len(mixture.sources)} sources; examples of at most {flags.max_tokens:,} tokens of {flags.tokenizer}; "
        f"{flags.num_proc} processes",
        flush=True,
    )
    scan, note = measure(flags, mixture, tokenizer)
    examples, summary = choose_examples(scan, mixture, flags.seed)
    if not examples:
        scan.journal.unlink()  # other flags are the cure, and it belongs to these
        raise UserError(
            f"--config: no example of {flags.config} fits; raise --max_tokens, or loosen filters and shares"
        )
    if lost := lost_shares(mixture.sources, summary):
        scan.journal.unlink()
        raise UserError(f"--config: {'; '.join(lost)}; change filters, shares or the total in {flags.config}")
    stats = statistics(scan, mixture, examples, summary) | origin(flags, tokenizer)
    drawn = {source["name"]: source["lengths"] for source in stats["sources"]}
    with atomic_file(flags.output) as writing:  # renamed last: its existence marks a complete run
        write_examples(writing, scan, mixture, examples)
        written = write_statistics(flags.output, stats, drawn, "examples")
    scan.journal.unlink()
    print("\n".join(filter(None, [note, report(stats, mixture), written])), flush=True)


if __name__ == "__main__":
    main()
