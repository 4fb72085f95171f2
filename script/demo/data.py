"""What are the demo's training samples and held-out tokens? Source files of this Python's standard library.

    python script/demo/data.py --output output/demo-data

Files held out of pretraining are held out here too: script/shared/stdlib.py splits by a hash of the path.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl, heldout.bin, prompt.txt")
    parser.add_argument("--seed", type=int, default=42, help="(42)")
    return parser.parse_args()


import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from component.storage.claim import claimed
from script.shared.stdlib import default_library, library_name, split_library

BASE = Path(__file__).resolve().parent / "base"
LINE_CHARACTERS = 8000  # a little more than 2048 tokens of Python
HELD_OUT_TOKENS = 70_000
PROMPT_TOKENS = 1_700  # of the prompt for inference
LONGEST_TOKENS = 12_288  # per held-out file, so that no single one dominates


def pieces(text: str, characters: int) -> list[str]:
    """Split `text` at line ends into pieces of at least `characters`; the last piece takes the rest."""
    cuts, start = [], 0
    while (end := text.find("\n", start + characters)) != -1 and len(text) - end > characters:
        cuts.append(text[start:end])
        start = end + 1
    return [*cuts, text[start:]]


def training_lines(files: dict[str, str], seed: int) -> list[str]:
    """JSON lines of at least LINE_CHARACTERS each, shuffled; shorter files are left out."""
    long_enough = (text for text in files.values() if len(text) > LINE_CHARACTERS)
    texts = [piece for text in long_enough for piece in pieces(text, LINE_CHARACTERS)]
    random.Random(seed).shuffle(texts)
    return [json.dumps({"text": text}) for text in texts]


def held_out_tokens(files: dict[str, str], tokenizer: PreTrainedTokenizerBase, seed: int) -> np.ndarray:
    """(tokens,) uint16: <s> text </s> of long held-out files, concatenated, at most HELD_OUT_TOKENS."""
    texts = [text for text in files.values() if len(text) > LINE_CHARACTERS]
    random.Random(seed).shuffle(texts)
    tokens: list[int] = []
    for text in texts:
        tokens += [*tokenizer(text).input_ids[:LONGEST_TOKENS], tokenizer.eos_token_id]
        if len(tokens) >= HELD_OUT_TOKENS:
            break
    return np.array(tokens[:HELD_OUT_TOKENS], dtype=np.uint16)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    files = [flags.output / name for name in ("train.jsonl", "heldout.bin", "prompt.txt")]
    with claimed({"--output": files}, {}):
        write(files, flags.seed)


def write(files: list[Path], seed: int) -> None:
    samples, tokens_file, prompt = files
    library = default_library()
    training, held_out = split_library(library)
    lines = training_lines(training, seed)
    samples.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(BASE, model_max_length=10**9)
    tokens = held_out_tokens(held_out, tokenizer, seed)
    tokens.tofile(tokens_file)
    prompt_ids = tokenizer(max(held_out.values(), key=len), add_special_tokens=False).input_ids[:PROMPT_TOKENS]
    prompt.write_text(tokenizer.decode(prompt_ids).rpartition("\n")[0] + "\n", encoding="utf-8")
    print(f"{library_name(library)}: {len(lines)} training texts, {len(tokens):,} tokens of held-out files")


if __name__ == "__main__":
    main()
