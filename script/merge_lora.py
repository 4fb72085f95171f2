"""Merge an adapter into its base: a plain model folder with tokenizer and extended config.

cd script && python merge_lora.py                                 # the newest finished run under output/
python script/merge_lora.py --adapter_name_or_path output/RUN --save_path MODEL
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from component.checkpoint import atomic_folder, check_target, merged_folder, newest_run, read_record, write_record
from component.error import exit_on_user_error
from component.model import load_merged


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="base model (default: the one that the adapter was trained on)")
    parser.add_argument("--adapter_name_or_path", help="adapter folder (default: the newest finished run)")
    parser.add_argument("--save_path", help="folder to write (default: the adapter's, with -merged added)")
    parser.add_argument("--context_size", type=int, help="tokens, for adapters of other projects that do not say it")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"], help="of the result")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    adapter = Path(flags.adapter_name_or_path) if flags.adapter_name_or_path else newest_run()
    target = Path(flags.save_path) if flags.save_path else merged_folder(adapter)
    check_target(target, "--save_path")
    print(f"merging {adapter} into {target}", file=sys.stderr, flush=True)
    model, tokenizer = load_merged(
        flags.model_name_or_path, str(adapter), context_size=flags.context_size, dtype=getattr(torch, flags.dtype)
    )
    record = read_record(adapter)
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if record is not None:
            write_record(folder, {**record, "merged_from": str(adapter.resolve()), "dtype": flags.dtype})
    print(f"{target}: a plain model, {model.num_parameters():,} parameters in {flags.dtype}")


if __name__ == "__main__":
    main()
