"""How long do products with frozen NF4 weights take in bf16 and in FP8? Part by part, in milliseconds.

    python script/performance/matmul.py --output_json matmul.json
    python script/performance/matmul.py --sizes 7b --tokens 8192 --output_json matmul.json

For each linear layer of a model's shape, forward (x W^T) and for the gradient of the input (d W): in bf16, W is
dequantized and multiplied; in FP8, the activation and W are quantized and multiplied, summing fast or exactly
(component/float8/product.py). The relative error is that of the FP8 product against the bf16 one, of random numbers.
Without a GPU, plain operations are timed on the CPU, to try the program.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import check_at_least, exit_on_user_error, new_parser, parsed_first
from script.shared.shape import SHAPES, Shape


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["7b", "13b"], help="shapes (default 7b 13b)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768], help="default 8192 32768")
    parser.add_argument("--runs", type=int, default=20, help="of which the median is taken (default 20)")
    parser.add_argument("--output_json", required=True, help="file for the results")
    return parser.parse_args()


import bitsandbytes as bnb
import torch
from torch import Tensor

from component.error import UserError
from component.float8.product import CAPABILITY, multiply, quantize, quantize_weight
from component.memory.linear import LoRALinear
from component.memory.rate import gpu_seconds
from component.storage.claim import held_result
from component.storage.result import origin, write_json
from script.shared.card import describe_card


def layers_of(shape: Shape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers of a decoder layer; of those of the same shape, the first."""
    keys = shape.hidden // shape.heads * shape.kv_heads
    found = {
        "q_proj": (shape.hidden, shape.hidden),
        "k_proj": (shape.hidden, keys),
        "gate_proj": (shape.hidden, shape.mlp),
        "down_proj": (shape.mlp, shape.hidden),
    }
    return {name: sides for name, sides in found.items() if list(found.values()).index(sides) == [*found].index(name)}


def nf4_layer(inputs: int, outputs: int, device: torch.device) -> LoRALinear:
    """A frozen linear layer with random NF4 weights, double-quantized as in training."""
    options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, **options)
    weight = torch.empty(outputs, inputs, dtype=torch.bfloat16).normal_(std=inputs**-0.5)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
    return LoRALinear(layer.to(device))


def milliseconds(run: Callable[[], object], runs: int, device: torch.device) -> float:
    if device.type == "cuda":
        return round(1e3 * gpu_seconds(run, runs), 4)
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(found), 4)


@torch.no_grad()
def measure(layer: LoRALinear, x: Tensor, backward: bool, runs: int) -> dict[str, float]:
    """Milliseconds of each part for `x` (N, I), or (N, O) if `backward`, and the error of FP8."""
    weight = layer.weight(torch.bfloat16)
    right = weight if backward else weight.t()
    left, rounded = quantize(x), quantize_weight(layer.base.weight, transposed=backward)
    parts = {
        "dequantize": lambda: layer.weight(torch.bfloat16),
        "bf16_product": lambda: x @ right,
        "quantize_activation": lambda: quantize(x),
        "quantize_weight": lambda: quantize_weight(layer.base.weight, transposed=backward),
        "fp8_product": lambda: multiply(left, rounded, torch.bfloat16),
        "fp8_product_exact_sums": lambda: multiply(left, rounded, torch.bfloat16, fast=False),
    }
    found = {name: milliseconds(run, runs, x.device) for name, run in parts.items()}
    found["bf16"] = round(found["dequantize"] + found["bf16_product"], 4)
    quantized = found["quantize_activation"] + found["quantize_weight"]
    found["fp8"] = round(quantized + found["fp8_product"], 4)
    exact = (x @ right).float()
    off = multiply(left, rounded, torch.bfloat16).float().sub_(exact)
    return found | {"fp8_error": round(float(off.norm() / exact.norm()), 5)}


def rows_of(flags: argparse.Namespace, device: torch.device) -> list[dict]:
    rows = []
    for size in flags.sizes:
        for name, (inputs, outputs) in layers_of(SHAPES[size]).items():
            layer = nf4_layer(inputs, outputs, device)
            for tokens in flags.tokens:
                for backward in (False, True):
                    x = torch.randn(tokens, outputs if backward else inputs, device=device, dtype=torch.bfloat16)
                    row = {"size": size, "layer": name, "inputs": inputs, "outputs": outputs, "tokens": tokens}
                    row |= {"product": "input gradient" if backward else "forward"}
                    rows.append(row | measure(layer, x, backward, flags.runs))
                    print(rows[-1], flush=True)
    return rows


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    check_at_least(flags, 1, "runs")
    if min(flags.tokens) < 1:
        raise UserError(f"--tokens: {min(flags.tokens)}; use at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and torch.cuda.get_device_capability() < CAPABILITY:
        raise UserError(f"{torch.cuda.get_device_name()} has no FP8; use an Ada, Hopper or Blackwell GPU")
    with held_result(flags.output_json):
        write_json(flags.output_json, {"rows": rows_of(flags, device), **describe_card(), **origin()})


if __name__ == "__main__":
    main()
