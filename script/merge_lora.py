"""Merge an adapter into its base: a plain model folder with tokenizer and extended config.

cd script && python merge_lora.py                                 # the newest finished run under output/
python script/merge_lora.py --adapter_name_or_path output/RUN --save_path MODEL
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from component.checkpoint import merged_folder, newest_run, read_record, write_record
from component.error import exit_on_user_error
from component.folder import atomic_folder, check_target
from component.merge import write_merged
from component.merge_plan import BASES, plan_merge
from component.model import load_tokenizer, locate, stretched_config
from component.shard import shard_bytes


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="base model (default: the one that the adapter was trained on)")
    parser.add_argument("--adapter_name_or_path", help="adapter folder (default: the newest finished run)")
    parser.add_argument("--save_path", help="folder to write (default: the adapter's, with -merged added)")
    parser.add_argument("--context_size", type=int, help="tokens, for adapters of other projects that do not say it")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"], help="of the result")
    parser.add_argument("--base", default="fp16", choices=BASES, help="add to the base's own weights, or to NF4 ones")
    parser.add_argument("--max_shard_size", default="5GB", help="of a file of weights (5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there already")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    adapter = Path(flags.adapter_name_or_path) if flags.adapter_name_or_path else newest_run()
    target = Path(flags.save_path) if flags.save_path else merged_folder(adapter)
    check_target(target, "--save_path", flags.overwrite)
    max_shard_bytes = shard_bytes(flags.max_shard_size)
    print(f"merging {adapter} into {target}", file=sys.stderr, flush=True)
    base, own, is_ours = locate(flags.model_name_or_path, str(adapter))
    config = stretched_config(own, flags.context_size, is_fixed=is_ours)
    plan = plan_merge(base, str(adapter), config, dtype=getattr(torch, flags.dtype), base_weights=flags.base)
    record = read_record(adapter)
    with atomic_folder(target, flags.overwrite) as folder:
        write_merged(folder, plan, load_tokenizer(own), max_shard_bytes=max_shard_bytes)
        if record is not None:
            merged_from = {"merged_from": str(adapter.resolve()), "base_weights": flags.base, "dtype": flags.dtype}
            write_record(folder, {**record, **merged_from})
    print(f"{target}: a plain model, {plan.parameters:,} parameters in {flags.dtype}")


if __name__ == "__main__":
    main()
