"""How fast was each row of a benchmark, against Unsloth and the GPU's peak? Prints the table of script/benchmark.py.

python script/performance/report.py figure/benchmark.json
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from component.error import UserError
from script.shared.shape import SHAPES, Shape

ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?((?:[\w.]*(?:Error|Exception)|error): .*(?:\n +- .*)*)", re.MULTILINE)
PEAKS = ("estimated_gib", "peak_allocated_gib", "peak_reserved_gib", "device_in_use_gib", "host_peak_gib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", type=Path, help="JSON file of script/benchmark.py")
    print(table(json.loads(parser.parse_args().benchmark.read_text(encoding="utf-8"))["rows"]))


def table(rows: list[dict]) -> str:
    """One line per row, with the speed relative to Unsloth at the same size and length where measured."""
    unsloth = {
        (row["size"], row["length"]): row["tokens_per_second"]
        for row in rows
        if row["kind"] == "unsloth" and not row["overrides"] and "error" not in row
    }
    heads = (
        "tokens/s",
        "/ unsloth",
        "of matrix",
        "MFU",
        "tokens/s/GiB",
        "estimate",
        "peak GiB",
        "reserved",
        "in use",
        "host GiB",
    )
    lines = [
        f"{'size':<12}{'tokens':>8}  {'kind':<24}" + "".join(f"{head:>{max(11, len(head) + 2)}}" for head in heads)
    ]
    for row in rows:
        label = " ".join([row["kind"], *(f"{name}={value}" for name, value in row["overrides"].items())])
        label += f" on {row['cards']} cards" if row.get("cards", 1) > 1 else ""
        line = f"{row['size']:<12}{row['length']:>8}  {label:<24}"
        if "error" in row:
            lines.append(f"{line}  {row['error'][:90]}")
            continue
        base = unsloth.get((row["size"], row["length"]))
        ratio = f"{row['tokens_per_second'] / base:.2f}" if base else "-"
        peaks = (row.get(name) for name in PEAKS)
        cells = (
            f"{row['tokens_per_second']:.0f}",
            ratio,
            row["share_of_matrix_rate"],
            row.get("mfu"),
            per_gib(row),
            *peaks,
        )
        widths = (max(11, len(head) + 2) for head in heads)
        texts = ("-" if cell is None else str(cell) for cell in cells)
        lines.append(line + "".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True)))
    return "\n".join(lines)


def per_gib(row: dict) -> float | None:
    """Tokens per second for each GiB that PyTorch reserved on the GPU with the most."""
    reserved = row.get("peak_reserved_gib")
    return round(row["tokens_per_second"] / reserved, 1) if reserved else None


def mfu(flop: float, step_seconds: list[float], peak_tflops: float | None, cards: int = 1) -> float | None:
    """Model FLOP utilization of a step on all cards, of `published_flop`: over the dense bf16 peak, if known."""
    return round(flop / median_step(step_seconds) / 1e12 / peak_tflops / cards, 3) if peak_tflops else None


def speed(tokens: int, steps: int, found: dict, flop: float, matrix_tflops: float | None, cards: int = 1) -> dict:
    """The results of one row; values that need a GPU are None without one.

    Args:
        tokens: of a step on all cards; `flop` likewise.
    """
    trained = found["num_input_tokens_seen"] / steps
    if trained != tokens:
        return {"error": f"trained on {trained:g} tokens per step, not {tokens}"}
    step_seconds = median_step(found["step_seconds"])
    share = round(flop / step_seconds / 1e12 / matrix_tflops / cards, 3) if matrix_tflops else None
    return {
        "tokens_per_second": round(tokens / step_seconds, 1),
        "step_seconds": [round(seconds, 3) for seconds in found["step_seconds"]],
        "losses": [round(loss, 4) for loss in found["losses"]],
        "gradient_norms": [round(norm, 4) for norm in found.get("gradient_norms", [])],
        "tflop_per_step": round(flop / 1e12, 1),
        "share_of_matrix_rate": share,
        **{name: found.get(name) for name in PEAKS},
        # train.py's: its stages, the `time` line of its summary, micro-batches launched as a CUDA graph
        **{name: found[name] for name in ("startup_seconds", "expected", "graphed_micro_batches") if name in found},
    }


def median_step(step_seconds: list[float]) -> float:
    """Median without the first step, which compiles kernels and fills the allocator's cache."""
    return statistics.median(step_seconds[1:] or step_seconds)


def step_flop(size: str, length: int, group: int | None) -> float:
    """FLOP of a step of a model in SHAPES that recomputes every layer once: see `flop_of`."""
    return flop_of(SHAPES[size], length, group)


def flop_of(shape: Shape, length: int, group: int | None) -> float:
    """FLOP of a step that recomputes every layer once: 6 T W + 4 T h V + 16 L h P.

    T tokens. W: weights of the linear layers, (2 h (h + k) + 3 h m) in each of L layers of hidden size h, MLP size m
    and k numbers per token in keys: forward, recomputed forward, and backward to activations only, since they are
    frozen. Biases are added, which is no product. h V: lm_head, not recomputed. P:
    (query, key) pairs per head, in two matrix products forward, two recomputed and four backward: T (T + 1) / 2 with
    full attention; with groups of g, T (g + 1) / 2 - g² / 8, the mean over shifted and unshifted heads. LoRA's own
    products (3 % for 7B) are left out. Plans that recompute less count the same FLOP, so the MFU-like share of the
    matrix rate may exceed 1.
    """
    pairs = attention_pairs(length, group)
    products = 6 * length * shape.weights + 4 * length * shape.hidden * shape.vocabulary
    return products + 16 * shape.layers * shape.hidden * pairs


def attention_pairs(length: int, group: int | None) -> float:
    """(query, key) pairs per head of a row of `length` tokens; `group` None: full attention."""
    return length * (length + 1) / 2 if group is None else length * (group + 1) / 2 - group**2 / 8


def published_flop(size: str, length: int, group: int | None) -> float:
    """FLOP of a step as model FLOP utilization is published (PaLM, arXiv 2204.02311, appendix B): 6 T N + 12 L h P.

    N parameters that multiply: linear layers and lm_head; P as in `flop_of`, so attention is causal, and in groups
    where it is. Nothing that is recomputed counts. Gradients of all weights do, also of frozen ones, which nobody
    computes: so a third of 6 T N is not done in QLoRA.
    """
    shape = SHAPES[size]
    parameters = shape.weights + shape.hidden * shape.vocabulary
    return 6 * length * parameters + 12 * shape.layers * shape.hidden * attention_pairs(length, group)


def commit() -> str | None:
    """The git commit; None without git, as in an archive of the files."""
    try:
        words = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_results(file: Path, resume: bool) -> dict:
    if not file.exists():
        return {"rows": []}
    if not resume:
        raise UserError(f"--output_json: {file} exists; add --resume to continue it, or name another file")
    return json.loads(file.read_text(encoding="utf-8"))


def failure(log: str, status: int | None, limit_s: float) -> str:
    """The error of a failed row in one line."""
    if status is None:
        return f"killed after {limit_s:g} s"
    errors = [" ".join(error.split())[:300] for error in ERROR.findall(log)]
    out_of_memory = [error for error in errors if "out of memory" in error.lower()]
    return [*out_of_memory[:1], *errors[-1:], f"exit status {status}"][0]


if __name__ == "__main__":
    main()
