"""How is the demo's base pretrained: a 3.8 M Llama with a context of 512 tokens, on Python source code?

    python script/demo/pretrain.py --library cpython/*/lib/python3.1* --minutes 2.75 --output script/demo/base
    python script/demo/pretrain.py --steps 20 --batch_size 4 --output /tmp/base        # quick CPU test

Trains on the standard library of one or several Python versions; about 5 % of its modules are held out (stdlib.py).
Writes a model folder for `from_pretrained`, with pretrain.json, the record of the run.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first
from script.shared.stdlib import default_library
from script.shared.training_flags import add_training_flags

SEQ_LENGTH = 512  # tokens: the base's context, which the demo extends


@parsed_first
def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--library", type=Path, nargs="+", default=[default_library()], help="folders (this Python's)")
    add_training_flags(parser, SEQ_LENGTH, batch_size=256, learning_rate=3e-3)
    parser.add_argument("--num_attention_heads", type=int, default=8, help="query heads; half as many KV heads (8)")
    args = parser.parse_args()
    for library in args.library:
        if not library.is_dir():
            parser.error(f"--library {library} is not a folder")
    return args


import torch
from transformers import LlamaForCausalLM

from component.storage.atomic import atomic_folder
from script.shared.pretraining import (
    begin,
    build_model,
    describe,
    mean_loss,
    token_stream,
    train,
    train_tokenizer,
)
from script.shared.stdlib import library_name, split_library

VOCAB_SIZE = 4096
EVAL_LENGTHS = (256, 512, 1024, 2048)  # tokens


def read_libraries(libraries: list[Path]) -> tuple[list[str], list[str], list[dict]]:
    """(training texts, held-out texts, a record per library), deduplicated; no held-out text is in training."""
    splits = [split_library(library) for library in libraries]
    held_out = list(dict.fromkeys(text for _, held in splits for text in held.values()))
    seen, training, record = set(held_out), [], []
    for library, (files, held) in zip(libraries, splits, strict=True):
        new = [text for text in dict.fromkeys(files.values()) if text not in seen]
        seen.update(new)
        training += new
        record.append(
            {
                "name": library_name(library),
                "files": len(files) + len(held),
                "held_out_files": len(held),
                "training_files_not_seen_before": len(new),
                "training_bytes_not_seen_before": sum(len(text.encode()) for text in new),
            }
        )
    return training, held_out, record


def perplexity_table(folder: Path, held_out: torch.Tensor) -> dict:
    """Held-out perplexity of the saved model by window length, unchanged and with positions interpolated by 4."""
    table = {}
    for name, rope in (("default", {"rope_type": "default"}), ("linear 4", {"rope_type": "linear", "factor": 4.0})):
        rope_parameters = {**rope, "rope_theta": 10000.0}
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, rope_parameters=rope_parameters)
        model.to(held_out.device).eval()
        losses = {length: mean_loss(model, held_out, length) for length in EVAL_LENGTHS}
        table[name] = {length: round(math.exp(loss), 3) for length, loss in losses.items()}
        print(f"held-out perplexity, rope {name}: {table[name]}", flush=True)
    return table


@exit_on_user_error
def main() -> None:
    args = parse_args()
    device = begin(args)
    training_texts, held_out_texts, libraries = read_libraries(args.library)
    tokenizer = train_tokenizer(training_texts, VOCAB_SIZE, SEQ_LENGTH)
    training = token_stream(tokenizer, training_texts, args.seed).to(device)
    held_out = token_stream(tokenizer, held_out_texts, args.seed).to(device)
    shape = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "tie_word_embeddings": True}
    heads = {"num_attention_heads": args.num_attention_heads, "num_key_value_heads": args.num_attention_heads // 2}
    model = build_model(tokenizer, SEQ_LENGTH, rms_norm_eps=1e-5, **shape, **heads).to(device)
    sizes = {"training_tokens": len(training), "held_out_tokens": len(held_out), "parameters": model.num_parameters()}
    print(sizes, flush=True)
    with atomic_folder(args.output) as folder:  # locked during training against a second writer
        run = train(model, training, held_out, SEQ_LENGTH, args)
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record = {**describe(args, SEQ_LENGTH), "libraries": libraries, **sizes, **run}
        record["held_out_perplexity"] = perplexity_table(folder, held_out)
        (folder / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
