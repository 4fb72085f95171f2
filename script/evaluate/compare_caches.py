"""What rounding keys and values saves and costs: bytes, perplexity and logits with each cache.

    python script/evaluate/compare_caches.py --model_name_or_path MODEL --data_path FILE.bin --seq_len 2048

FILE.bin is a flat array of token ids, as evaluate.py reads. The first half of each window is read at once, the second
half token by token: only that half is scored.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error
from component.data.token_file import read_tokens
from component.evaluate.kv_cache import measure_cache_quantization
from component.inference.kv_cache import CACHES, check_cache
from component.loading import load_model
from component.storage.result import check_result_file, origin, write_json


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--context_size", type=int, help="tokens a base is stretched to")
    parser.add_argument("--data_path", required=True, help=".bin file of token ids")
    parser.add_argument("--seq_len", type=int, required=True, help="tokens per window")
    parser.add_argument("--windows", type=int, default=16, help="how many windows at most (16)")
    parser.add_argument("--output_json", help="where the figures go too")
    flags = parser.parse_args()
    check_result_file(flags.output_json, "--output_json")
    caches = [name for name in CACHES if name != "offloaded"]  # which rounds nothing
    for name in caches:
        check_cache(name)
    model = load_model(flags.model_name_or_path, context_size=flags.context_size)
    tokens = read_tokens(flags.data_path, model.config.vocab_size)
    rows = measure_cache_quantization(model, tokens, caches, flags.seq_len, flags.windows)
    print(f"{'cache':<10}{'MiB':>8}{'perplexity':>12}{'logits change by':>18}{'same likeliest token':>22}")
    for row in rows:
        mebibytes = row.bytes_per_window / 2**20
        change, same = f"{row.logit_change:.4f}", f"{row.same_choice:.1%}"
        print(f"{row.cache:<10}{mebibytes:>8.2f}{row.perplexity:>12.4f}{change:>18}{same:>22}")
    if flags.output_json:
        record = {**origin(), "dtype": str(model.dtype).removeprefix("torch."), "seq_len": flags.seq_len}
        write_json(flags.output_json, {**record, "caches": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
