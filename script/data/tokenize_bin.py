"""Tokenize texts into a token file and its index, for evaluate.py, train.py and others that read flat arrays.

    python script/data/tokenize_bin.py --source books-validation.jsonl.xz --tokenizer NousResearch/Llama-2-7b-hf \\
        --output data/validation.bin --bos each --eos each

FILE.bin holds uint16 ids (uint32 above 65535 tokens), document after document in input order; FILE.bin.json says where
each document starts, and which tokenizer was used.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first
from component.corpus.flags import add_common_flags, add_source_flags, check_common_flags
from component.data import BOS, EOS


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_source_flags(parser)
    add_common_flags(parser)
    parser.add_argument("--bos", choices=BOS, default="each", help="documents that <s> precedes (each)")
    parser.add_argument("--eos", choices=EOS, default="each", help="documents that </s> follows (each)")
    parser.add_argument("--max_documents", type=int, help="only the first N documents")
    return parser.parse_args()


from component.corpus.output import claimed_output, open_tokenizer, resolve_sources, versions
from component.corpus.tokenize import documents
from component.data.source import RecordTally
from component.data.token_file import index_path, write_tokens
from component.storage.result import command


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_common_flags(flags, "max_documents")
    paths = resolve_sources(flags)
    with claimed_output(flags, [index_path(flags.output)], paths):
        build(flags, paths)


def build(flags: argparse.Namespace, paths: list[Path]) -> None:
    tokenizer = open_tokenizer(flags)
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    print(f"{len(paths)} files, {megabytes:,.1f} MB; {flags.tokenizer}; {flags.num_proc} processes", flush=True)
    tally = RecordTally()
    index = write_tokens(
        flags.output,
        documents(
            paths,
            tokenizer,
            tally,
            key=flags.text_key,
            num_proc=flags.num_proc,
            max_documents=flags.max_documents,
            max_bad_fraction=flags.max_bad_fraction,
        ),
        tokenizer,
        name=flags.tokenizer,
        bos=flags.bos,
        eos=flags.eos,
        sources=[path.name for path in paths],
        command=command(),
        versions=versions(),
        overwrite=flags.overwrite,
    )
    note = tally.refuse_if_too_many(flags.max_bad_fraction)
    summary = f"{index.documents:,} documents, {index.tokens:,} tokens in {index.dtype} -> {flags.output}"
    print("\n".join(filter(None, [note, summary])), flush=True)


if __name__ == "__main__":
    main()
