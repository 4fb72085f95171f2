"""How fast is evaluation compared with the model's bare forward pass? With random weights, on one GPU.

    python script/performance/evaluation.py --output_json figure/evaluation_speed.json
    python script/performance/evaluation.py --rows tiny:256 --windows 2 --output_json FILE     # quick CPU test

For each row SHAPE:TOKENS, seconds per window and tokens per second of: `bare`, decoder and LM head alone; `evaluate`,
the computation of evaluate.py, with perplexity by position; `transposed`, the same with its former loss, cross-entropy
on (B, V, tokens) logits.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first
from script.shared.shape import SHAPES, Shape

SMALL = {"135m": Shape(576, 1536, 30, 9, 3, 49152, tied=True)}  # SmolLM2's
ROWS = ["135m:16384", "7b:8192", "7b:131072"]


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    shapes = ", ".join([*SHAPES, *SMALL])
    parser.add_argument(
        "--rows", nargs="+", default=ROWS, help=f"SHAPE:TOKENS, of {shapes} (default {' '.join(ROWS)})"
    )
    parser.add_argument("--windows", type=int, default=3, help="timed windows per row; the median counts (default 3)")
    parser.add_argument("--output_json", required=True, help="file for the results")
    return parser.parse_args()


import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from component import loss
from component.error import UserError
from component.evaluate import perplexity
from component.storage.claim import held_result
from component.storage.result import origin, write_json
from script.shared.card import describe_card
from script.shared.random_model import config_of


def build(shape: str, device: torch.device) -> PreTrainedModel:
    config = config_of(replace((SHAPES | SMALL)[shape], context=131072))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


@torch.no_grad()
def bare(model: PreTrainedModel, tokens: np.ndarray, length: int) -> None:
    ids = torch.from_numpy(tokens[:length].astype(np.int64))[None].to(model.device)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    for part in hidden.split(loss.TOKENS_PER_CHUNK, 1):
        model.get_output_embeddings()(part)


def evaluate(model: PreTrainedModel, tokens: np.ndarray, length: int) -> None:
    perplexity.measure_perplexity(model, tokens, seq_len=length, stride=length, position_buckets=16)


def transposed(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    """Cross-entropy of (tokens, V) logits, computed in the layout (1, V, tokens)."""
    return F_CROSS_ENTROPY(logits[None].transpose(1, 2), target[None], **options)[0]


F_CROSS_ENTROPY = F.cross_entropy


def seconds(run: Callable[[], None], times: int) -> float:
    """Median of `times` runs after one warm-up run."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def measure(row: str, windows: int, device: torch.device) -> dict[str, Any]:
    shape, _, text = row.partition(":")
    if shape not in SHAPES | SMALL or not text.isdecimal():
        raise UserError(f"--rows: {row!r}; use SHAPE:TOKENS, as in {ROWS[0]}")
    length, model = int(text), build(shape, device)
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=2 * length + 1, dtype=np.uint32)
    found = {"bare": seconds(lambda: bare(model, tokens, length), windows)}
    found["evaluate"] = seconds(lambda: evaluate(model, tokens, length), windows)
    F.cross_entropy = transposed  # type: ignore[assignment]
    try:
        found["transposed"] = seconds(lambda: evaluate(model, tokens, length), 1)
    finally:
        F.cross_entropy = F_CROSS_ENTROPY
    rates = {f"{name}_tokens_per_second": round(length / time) for name, time in found.items()}
    return {
        "row": row,
        **found,
        **rates,
        "evaluate_over_bare": round(found["evaluate"] / found["bare"], 3),
        "transposed_over_evaluate": round(found["transposed"] / found["evaluate"], 2),
    }


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    with held_result(flags.output_json):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rows = []
        for row in flags.rows:
            rows.append(measure(row, flags.windows, device))
            print(rows[-1], flush=True)
            write_json(flags.output_json, {"rows": rows, **describe_card(), **origin()})
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
