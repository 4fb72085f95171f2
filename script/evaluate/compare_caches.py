"""Compare KV-cache types: bytes, perplexity and change of the logits.

    python script/evaluate/compare_caches.py --model_name_or_path MODEL --data_path FILE.bin --seq_len 2048

FILE.bin is a flat array of token ids, as for evaluate.py. The first half of each window is prefilled, the second half
is decoded token by token and scored.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import QUIET, check_at_least, exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--context_size", type=int, help="tokens to which a plain base is scaled")
    parser.add_argument("--data_path", required=True, help=".bin file of token ids, or its hub id")
    parser.add_argument("--seq_len", type=int, required=True, help="tokens per window, at least 128")
    parser.add_argument("--windows", type=int, default=16, help="maximum number of windows (default 16)")
    parser.add_argument("--output_json", help="file for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--quiet", **QUIET)
    return parser.parse_args()


from component.data.token_file import read_tokens
from component.error import UserError
from component.evaluate.kv_cache import LEAST, measure_cache_quantization
from component.evaluate.model_spec import local_tokens
from component.evaluate.table import grid
from component.inference.flags import CACHES
from component.inference.kv_cache import check_cache, is_quantizable
from component.loading import inference_config, load_model
from component.storage.claim import claimed
from component.storage.result import origin, write_json


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_at_least(flags, 1, "windows", "context_size")
    check_at_least(flags, LEAST, "seq_len")
    flags.data_path = local_tokens(flags.data_path)
    read = {"--model_name_or_path": [flags.model_name_or_path], "--data_path": [flags.data_path]}
    with claimed({"--output_json": [flags.output_json]}, read, overwrite=flags.overwrite):
        compare(flags)


def compare(flags: argparse.Namespace) -> None:
    caches = [name for name in CACHES if name != "offloaded"]  # not quantized
    for name in caches:
        check_cache(name)
    config = inference_config(flags.model_name_or_path, context_size=flags.context_size)
    if not is_quantizable(config):
        raise UserError(
            f"--model_name_or_path: the layers of {flags.model_name_or_path} ({config.model_type}) do not all attend "
            "to every token, so its keys and values can't be quantized; name another model"
        )
    model = load_model(flags.model_name_or_path, context_size=flags.context_size)
    tokens = read_tokens(flags.data_path, model.config.vocab_size)
    results = measure_cache_quantization(model, tokens, caches, flags.seq_len, flags.windows)
    rows = []
    for r in results:
        cells = [f"{r.bytes_per_window / 2**20:.2f}", f"{r.perplexity:.4f}", f"{r.logit_change:.4f}"]
        rows.append([r.cache, *cells, f"{r.same_choice:.1%}"])
    print(grid(["cache", "MiB", "perplexity", "mean logit change", "same top-1 token"], rows))
    if flags.output_json:
        record = {**origin(), "dtype": str(model.dtype).removeprefix("torch."), "seq_len": flags.seq_len}
        write_json(flags.output_json, {**record, "caches": [asdict(result) for result in results]})


if __name__ == "__main__":
    main()
