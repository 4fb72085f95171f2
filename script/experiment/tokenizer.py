"""How is the tokenizer of the experiments' base trained: a byte-level BPE with 8192 tokens?

    python script/experiment/tokenizer.py --train books-train.jsonl.xz proof-train.jsonl.xz \\
        --output output/experiment/tokenizer
"""

import argparse
import sys
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--train", type=Path, nargs="+", required=True, help='files of {"text"} records')
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    return parser.parse_args()


from component.data.source import RecordTally, read_records
from component.storage.atomic import atomic_folder, check_target
from script.experiment.rows import BASE_CONTEXT
from script.shared.pretraining import train_tokenizer

VOCAB_SIZE = 8192
BPE_CHARACTERS = 30_000_000  # per file


def texts_of(file: Path) -> list[str]:
    tally = RecordTally()
    texts = [record["text"] for _, record in tally.good(file, read_records(file, ("text",)))]
    tally.refuse_if_too_many()
    return texts


def first_parts(texts: list[str]) -> list[str]:
    """The same number of characters of every text, at most BPE_CHARACTERS in all."""
    share = BPE_CHARACTERS // len(texts)
    return [text[:share] for text in texts]


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_target(flags.output, "--output")
    samples = chain.from_iterable(first_parts(texts_of(file)) for file in flags.train)
    with atomic_folder(flags.output) as folder:
        train_tokenizer(samples, VOCAB_SIZE, BASE_CONTEXT).save_pretrained(folder)


if __name__ == "__main__":
    main()
