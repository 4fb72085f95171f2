"""Build a pretraining corpus: a uniform sample of deduplicated texts of 4096 to 32768 tokens, or a mixture.

    python script/data/build_pretrain.py --source books.jsonl.xz articles/ --tokenizer NousResearch/Llama-2-7b-hf \\
        --output data/pretrain.jsonl --min_tokens 4096 --max_tokens 32768 --num_samples 54212 --seed 42
    python script/data/build_pretrain.py --config script/data/pretrain_sources.yaml --tokenizer ... --output ...

A mixture takes texts from several sources in configured shares of tokens, each with its own range of lengths.
Beside FILE.jsonl, for train_file: FILE.stats.json (what was read, excluded and sampled, and lengths) and FILE.png (the
length distribution). An interrupted run resumes where it stopped; the output is the same, byte for byte, with any
--num_proc.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first
from component.corpus.flags import LONG_TEXTS, add_common_flags, add_source_flags, check_common_flags


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_source_flags(parser, required=False)
    config = "YAML of a mixture's sources instead, which has its own lengths; see pretrain_sources.yaml"
    parser.add_argument("--config", type=Path, help=config)
    add_common_flags(parser)
    parser.add_argument("--min_tokens", type=int, help="shortest text, as training counts tokens (4096)")
    parser.add_argument("--max_tokens", type=int, help="longest text, as training counts tokens (32768)")
    parser.add_argument("--num_samples", type=int, help="maximum of texts (54212, as in the original)")
    parser.add_argument("--seed", type=int, default=42, help="of the sample (42)")
    long_texts = "longer texts: drop, as in the original, or split at ends of paragraphs (drop)"
    parser.add_argument("--long_texts", choices=LONG_TEXTS, help=long_texts)
    return parser.parse_args()


DEFAULTS = {"min_tokens": 4096, "max_tokens": 32768, "num_samples": 54212, "long_texts": "drop", "text_key": "text"}


from component.corpus.length import describe_lengths
from component.corpus.mixture import lost_shares
from component.corpus.output import (
    claimed_output,
    journal_path,
    measure_files,
    open_tokenizer,
    origin,
    resolve_sources,
    statistics_paths,
    write_statistics,
)
from component.corpus.pretrain import Choice, TextMeasure, sample_texts, write_corpus
from component.corpus.scan import Scan, SourceFile
from component.corpus.text_mixture import (
    MixedTextMeasure,
    TextMixture,
    read_text_mixture,
    sample_mixture,
    write_mixture,
)
from component.error import UserError
from component.storage.atomic import atomic_file
from component.tokenizer import tokenizer_hash


def check_flags(flags: argparse.Namespace) -> None:
    if bool(flags.source) == bool(flags.config):
        both = "both" if flags.source else "neither"
        raise UserError(f"--source, --config: {both} given; name files, or a YAML of sources")
    given = [name for name in DEFAULTS if getattr(flags, name) is not None]
    if flags.config:
        if given:
            raise UserError(f"--{given[0]}: {getattr(flags, given[0])} beside --config; write it there, by source")
        check_common_flags(flags)
        return
    for name, value in DEFAULTS.items():
        setattr(flags, name, value if getattr(flags, name) is None else getattr(flags, name))
    tokens = f"--min_tokens {flags.min_tokens}, --max_tokens {flags.max_tokens}: use 1 <= min <= max"
    is_range = 1 <= flags.min_tokens <= flags.max_tokens
    check_common_flags(flags, "num_samples", problems=[] if is_range else [tokens])


def statistics(flags: argparse.Namespace, scan: Scan, choices: list[Choice], duplicates: Counter) -> dict:
    sampled = Counter(choice.file for choice in choices)
    sources = [
        {
            "file": str(file.path),
            "bytes": file.path.stat().st_size,
            "read": count.read,
            "bad": count.bad,
            **{name: count.noted[name] for name in ("too_short", "too_long", "split")},
            "duplicates": duplicates[index],
            "kept": count.kept - duplicates[index],
            "sampled": sampled[index],
        }
        for index, (file, count) in enumerate(zip(scan.files, scan.counts, strict=True))
    ]
    names = list(sources[0])[1:]
    return {
        "counts": {name: sum(source[name] for source in sources) for name in names},
        "sources": sources,
        "lengths": describe_lengths([choice.tokens for choice in choices]),
    }


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_flags(flags)
    mixture = read_text_mixture(flags.config) if flags.config else None
    paths = [file for source in mixture.sources for file in source.files] if mixture else resolve_sources(flags)
    with claimed_output(flags, statistics_paths(flags.output), paths, journal_path(flags.output)):
        if mixture:
            mix(flags, mixture)
        else:
            build(flags, [SourceFile(path, (flags.text_key,)) for path in paths])


def build(flags: argparse.Namespace, files: list[SourceFile]) -> None:
    tokenizer = open_tokenizer(flags)
    megabytes = sum(file.path.stat().st_size for file in files) / 1e6
    print(
        f"{len(files)} files, {megabytes:,.1f} MB; texts of {flags.min_tokens:,} to {flags.max_tokens:,} tokens of "
        f"{flags.tokenizer}, longer ones: {flags.long_texts}; {flags.num_proc} processes",
        flush=True,
    )
    names = ("min_tokens", "max_tokens", "long_texts", "text_key")
    values = {name: getattr(flags, name) for name in names}
    settings = {"program": "build_pretrain", **values, "tokenizer": tokenizer_hash(tokenizer)}
    scan, note = measure_files(flags, files, settings, TextMeasure(tokenizer, *values.values()))
    choices, duplicates = sample_texts(scan, flags.num_samples, flags.seed)
    if not choices:
        scan.journal.unlink()  # other flags are the cure, and it belongs to these
        raise UserError(
            f"--source: no text of {flags.min_tokens:,} to {flags.max_tokens:,} tokens in it; change --min_tokens or "
            "--max_tokens, or split longer texts with --long_texts split"
        )
    stats = statistics(flags, scan, choices, duplicates) | origin(flags, tokenizer)
    with atomic_file(flags.output) as writing:  # renamed last: its existence marks a complete run
        write_corpus(writing, scan, choices, flags.text_key)
        summary = write_statistics(flags.output, stats, {"": stats["lengths"]}, "texts")
    scan.journal.unlink()
    counts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in stats["counts"].items())
    print("\n".join(filter(None, [note, counts, summary])), flush=True)


def mix(flags: argparse.Namespace, mixture: TextMixture) -> None:
    tokenizer = open_tokenizer(flags)
    print(f"{len(mixture.sources)} sources; shares of {mixture.unit}; {flags.num_proc} processes", flush=True)
    files = [
        SourceFile(file, (source.text_key,), group)
        for group, source in enumerate(mixture.sources)
        for file in source.files
    ]
    rules = [[s.name, s.min_tokens, s.max_tokens, s.long_texts, s.text_key] for s in mixture.sources]
    settings = {"program": "build_pretrain mixture", "sources": rules, "tokenizer": tokenizer_hash(tokenizer)}
    scan, note = measure_files(flags, files, settings, MixedTextMeasure(tokenizer, mixture))
    choices, found = sample_mixture(scan, mixture, flags.seed)
    if not choices:
        scan.journal.unlink()
        raise UserError(f"--config: no text of {flags.config} fits; change lengths and shares there")
    if lost := lost_shares(mixture.sources, found):
        scan.journal.unlink()
        raise UserError(f"--config: {'; '.join(lost)}; change lengths, shares or the total in {flags.config}")
    sources = mixture_statistics(scan, mixture, choices, found)
    lengths = describe_lengths([choice.tokens for choice in choices])
    stats = {"unit": mixture.unit, "sources": sources, "lengths": lengths, **origin(flags, tokenizer)}
    with atomic_file(flags.output) as writing:
        write_mixture(writing, scan, mixture, choices, flags.seed)
        drawn = {source["name"]: source["lengths"] for source in sources if source["sampled"]}
        summary = write_statistics(flags.output, stats, drawn, "texts")
    scan.journal.unlink()
    total = sum(source["sampled_tokens"] for source in sources)
    lines = [
        f"{source['name']}: {source['sampled']:,} of {source['available']:,} texts, {source['sampled_tokens']:,} "
        f"tokens, {source['sampled_tokens'] / total:.1%}"
        for source in sources
    ]
    print("\n".join(filter(None, [note, *lines, summary])), flush=True)


def mixture_statistics(scan: Scan, mixture: TextMixture, choices: list[Choice], found: list[dict]) -> list[dict]:
    """What was read, excluded and sampled from each source, and lengths."""
    sources = []
    for group, source in enumerate(mixture.sources):
        counts = [count for file, count in zip(scan.files, scan.counts, strict=True) if file.group == group]
        noted = sum((count.noted for count in counts), Counter())
        lengths = [choice.tokens for choice in choices if scan.files[choice.file].group == group]
        sources.append(
            {
                "name": source.name,
                "files": [{"file": str(file), "bytes": file.stat().st_size} for file in source.files],
                **{key: getattr(source, key) for key in ("share", "count", "min_tokens", "max_tokens", "long_texts")},
                "read": sum(count.read for count in counts),
                "bad": sum(count.bad for count in counts),
                **{name: noted[name] for name in ("too_short", "too_long", "split")},
                "duplicates": sum(count.kept for count in counts) - found[group]["available"],
                **found[group],
                "lengths": describe_lengths(lengths),
            }
        )
    return sources


if __name__ == "__main__":
    main()
