"""Would the tests notice a wrong sign, a border off by one, a dropped scale? Plants such faults and runs the tests.

    make mutants
    .venv/bin/python -m tests.mutants --seed 1 --count 60

Takes minutes. Each mutant is one small change in one function of TARGETS, in a copy of the repository; the tests of
its module must fail on it, or hang. Status 1 if any mutant survives that EXPLAINED does not list.
"""

import argparse
import ast
import difflib
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("component", "script", "tests", "train_args", "train.py", "pyproject.toml", "requirements.txt")

# module -> the functions that are mutated, and the test files that must notice, besides the module's own
TARGETS: dict[str, tuple[str, str]] = {
    "component/attention/shift_short.py": (
        "document_spans attend_in_groups _halves _split_heads _groups _inside _needed _left_of",
        "tests/component/attention/test_exchange.py",
    ),
    "component/attention/segment.py": (
        "Segment.view Segment.left_inputs attend_segments FusedAttention.forward FusedAttention.backward _with_left "
        "_backward causal_sdpa",
        "tests/component/attention/test_shift_short.py tests/component/attention/test_exchange.py",
    ),
    "component/attention/kernel.py": ("attention_forward attention_backward merge_attention _per_kv_head", ""),
    "component/attention/exchange.py": (
        "Exchange.fetch Exchange.joined Exchange.give_back Exchange.add Exchange._counts Exchange._start",
        "",
    ),
    "component/attention/interface.py": (
        "TrainingMask.is_right_padded shift_short_mask shift_short_attention_forward use_shift_short_attention",
        "",
    ),
    "component/rope.py": ("original_context context_length extend_context", ""),
    "component/memory/offload.py": (
        "ActivationOffloader.put ActivationOffloader._release_outgoing ActivationOffloader._fetch "
        "ActivationOffloader._buffer _Entry.arriving _Entry._arrived",
        "",
    ),
    "component/memory/linear.py": (
        "LoRALinear.forward LoRALinear.low LoRALinear.backward LoRALinear.input_gradient accumulate add_gradient "
        "_drop",
        "",
    ),
    "component/loss.py": (
        "ChunkedLoss.forward next_token_loss _SummedLoss.forward _SummedLoss.backward _chunk next_token_losses "
        "_logits",
        "",
    ),
    "component/train/trainer.py": (
        "LongQLoRATrainer.floating_point_ops LongQLoRATrainer.prediction_step token_weighted_loss",
        "",
    ),
    "component/evaluate/perplexity.py": (
        "longlora_windows sliding_windows plan_windows mean_loss _long_ppl window_losses measure_perplexity",
        "",
    ),
    "component/evaluate/long_ppl.py": (
        "KeyTokenRule.first is_key key_mask KeyTokenFinder.__call__ find_key_tokens",
        "",
    ),
    "component/evaluate/aggregate.py": ("sum_window by_position by_document perplexity_of", ""),
    "component/merge/plan.py": ("_updates _tie _is_one_copy", "tests/component/merge/test_write.py"),
    "component/model.py": ("base_tensors tied_names", "tests/component/merge/test_plan.py"),
    "component/merge/write.py": ("merged_tensor _add_lora nf4_round_trip", ""),
    "component/merge/pair.py": (
        "Difference.add Difference.relative Difference.is_rounding Differences.of_tensor Source.read Side.__call__ "
        "_axis Pair._parts Pair.transform Pair.embed _probes _rounding_of_tiny",
        "tests/component/merge/test_stream.py",
    ),
    "component/merge/stream.py": (
        "_empty_model _modules_with_weights can_stream _base_sources _merged_tensors run_both _rotations _comparing",
        "",
    ),
    "component/merge/check.py": ("agreement", ""),
    "component/inference/quantized_layer.py": (
        "capacities BlockStore.append BlockStore._quantize BlockStore.dequantize History.segments "
        "BlockQuantizedLayer.update BlockQuantizedLayer._append BlockQuantizedLayer.crop",
        "tests/component/inference/test_block_attention.py tests/component/inference/test_kv_cache.py",
    ),
    "component/inference/block_attention.py": ("block_mask block_attention_forward merge_blocks", ""),
    "component/inference/cache_memory.py": ("cache_bytes", ""),
    "component/inference/batch.py": ("_read_each _left_padded _until_end", ""),
    "component/memory/shared_input.py": (
        "SharedInputLinears.forward SharedInputLinears.backward SharedCalls.output",
        "",
    ),
    "component/float8/product.py": ("quantize_weight scale_of _rounded _weight_scales", ""),
    "component/data/record.py": ("_refuse _changes_nothing _says", ""),
    "component/data/packing.py": ("pack PackedRows.__init__ pack_stream", ""),
    "component/data/sample.py": ("fit split", ""),
    "component/data/collator.py": ("RightPadCollator.__call__", ""),
}
# (function, its line, the line of the mutant): why no test can tell them apart. At most three
EXPLAINED: dict[tuple[str, str, str], str] = {}

SWAPPED: dict[type, tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
RENAMED = {"min": "max", "max": "min", "any": "all", "all": "any"}  # functions
DROPPED_CALLS = ("clamp", "float", "double", "contiguous", "detach", "mul_", "div_", "add_", "to", "t", "transpose")
NEUTRAL = {"alpha": "1", "scale": "None", "scaling": "None", "dropout": "0.0", "dropout_p": "0.0"}  # arguments
LIBRARIES = ("torch", "F", "np", "kernel", "aten")
# not behaviour that a test should fix: messages, types, checks of our own
COSTS = ("strict", "use_cache", "non_blocking")  # arguments that change no value
SKIPPED = (ast.Raise, ast.Assert, ast.JoinedStr, ast.arguments)


class Mutant(NamedTuple):
    path: str
    function: str
    line: int  # from 1
    start: int  # [start, end) in bytes of the file are replaced
    end: int
    text: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


class _Source:
    """A module's bytes, and where its nodes are."""

    def __init__(self, path: str, root: Path = ROOT):
        self.path, self.bytes = path, (root / path).read_bytes()
        self.tree = ast.parse(self.bytes)
        self.lines = [0]
        for line in self.bytes.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        at = (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        return self.lines[at[0] - 1] + at[1], self.lines[at[2] - 1] + at[3]

    def function(self, name: str) -> ast.FunctionDef:
        body: list[ast.stmt] = self.tree.body
        for part in name.split("."):
            found = [node for node in body if getattr(node, "name", None) == part]
            if not found:
                raise SystemExit(f"{self.path} has no {name}; change TARGETS in tests/mutants.py")
            body = found[0].body  # type: ignore[attr-defined]
        return found[0]  # type: ignore[return-value]

    def between(self, left: ast.AST, right: ast.AST, swap: tuple[str, str]) -> tuple[int, int, str] | None:
        """The operator between two operands, and its replacement."""
        start, end = self.span(left)[1], self.span(right)[0]
        at = self.bytes.find(swap[0].encode(), start, end)
        return None if at < 0 else (at, at + len(swap[0]), swap[1])


def mutants(path: str, function: str, root: Path = ROOT) -> list[Mutant]:
    """Every mutant of one function (`Class.method` for a method), in the order of the source."""
    source = _Source(path, root)
    body = source.function(function).body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]  # the docstring
    found = [
        Mutant(path, function, node.lineno, *change)  # type: ignore[attr-defined]
        for node in _nodes(body)
        for change in _changes(source, node)
    ]
    return sorted(set(found), key=lambda mutant: (mutant.start, mutant.end, mutant.text))


def _nodes(body: list[ast.stmt]) -> Iterator[ast.AST]:
    waiting: list[ast.AST] = [node for node in body if not _is_skipped(node)]
    while waiting:
        node = waiting.pop()
        yield node
        children = [child for child in ast.iter_child_nodes(node) if not _is_skipped(child)]
        waiting += [child for child in children if child is not getattr(node, "annotation", None)]


def _is_skipped(node: ast.AST) -> bool:
    is_print = isinstance(node, ast.Expr) and ast.unparse(node).startswith("print(")
    return isinstance(node, SKIPPED) or is_print or (isinstance(node, ast.keyword) and node.arg in COSTS)


def _changes(source: _Source, node: ast.AST) -> Iterator[tuple[int, int, str]]:
    """(start, end, new text) of each change of one node."""
    change = None
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        change = source.between(node.left, node.right, SWAPPED[type(node.op)])
    elif isinstance(node, ast.AugAssign):
        yield *source.span(node), "pass"
        swap = SWAPPED.get(type(node.op))
        change = source.between(node.target, node.value, swap) if swap else None
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPPED:
        change = source.between(node.left, node.comparators[0], SWAPPED[type(node.ops[0])])
    elif isinstance(node, ast.BoolOp):
        change = source.between(*node.values[:2], SWAPPED[type(node.op)])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        change = (*source.span(node), f"({ast.unparse(node.operand)})")
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        change = (*source.span(node), "pass")
    elif isinstance(node, ast.keyword) and node.arg in NEUTRAL:
        change = (*source.span(node.value), NEUTRAL[node.arg])
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        change = (*source.span(node), str(not node.value))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        change = (*source.span(node), str(node.value + 1))
        if node.value:  # the last element instead of the first is often the same one
            yield *source.span(node), str(node.value - 1)
    elif isinstance(node, ast.Call):
        yield from _changed_call(source, node)
    if change is not None:
        yield change


def _changed_call(source: _Source, node: ast.Call) -> Iterator[tuple[int, int, str]]:
    called = node.func
    if isinstance(called, ast.Name) and called.id in RENAMED:
        yield *source.span(called), RENAMED[called.id]
    elif isinstance(called, ast.Attribute) and called.attr in DROPPED_CALLS:
        end = source.span(called)[1]
        if not (isinstance(called.value, ast.Name) and called.value.id in LIBRARIES):
            yield source.bytes.rindex(b".", 0, end), source.span(node)[1], ""


def draw(seed: int, count: int, only: str = "") -> list[Mutant]:
    """`count` mutants, from as many functions as possible; a function's do not depend on other modules."""
    piles = []
    for path, (functions, _) in TARGETS.items():
        for function in functions.split() if only in path else ():
            pile = mutants(path, function)
            random.Random(f"{seed} {path} {function}").shuffle(pile)
            piles.append(pile)
    random.Random(seed).shuffle(piles)
    rounds = range(max(map(len, piles)))
    return [pile[at] for at in rounds for pile in piles if at < len(pile)][:count]


def own_tests(path: str) -> list[str]:
    return [f"tests/{Path(path).parent}/test_{Path(path).name}", *TARGETS[path][1].split()]


def copy_repository(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "output")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, path: str, limit: float) -> str:
    """`passed`, `failed` or `hung` (beyond `limit` seconds): the tests of the module `path` in a copy."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *own_tests(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    output = subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
    ) as tests:
        try:
            return "failed" if tests.wait(limit) else "passed"
        except subprocess.TimeoutExpired:
            return "hung"
        finally:
            if tests.poll() is None:
                os.killpg(tests.pid, signal.SIGKILL)  # with all that the tests started


def describe(mutant: Mutant) -> tuple[str, tuple[str, str, str]]:
    """The diff, and the mutant's key in EXPLAINED."""
    source = (ROOT / mutant.path).read_bytes()
    before, after = (text.decode().splitlines() for text in (source, mutant.apply(source)))
    diff = [
        line
        for line in difflib.unified_diff(before, after, n=0, lineterm="")
        if not line.startswith(("-" * 3, "+++", "@@"))
    ]
    old, new = (" ".join(line[1:].strip() for line in diff if line[0] == sign) for sign in "-+")
    return "\n".join(f"    {line}" for line in diff), (mutant.function, old, new)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--count", type=int, default=30, help="number of mutants (default 30)")
    parser.add_argument("--only", default="", help="of modules whose path contains this (default all)")
    parser.add_argument("--jobs", type=int, default=2, help="test processes at a time (default 2)")
    flags = parser.parse_args()
    drawn, begin = draw(flags.seed, flags.count, flags.only), time.monotonic()
    described = [describe(mutant) for mutant in drawn]
    paths = list(dict.fromkeys(mutant.path for mutant in drawn))
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary, ThreadPoolExecutor(flags.jobs) as pool:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(flags.jobs):
            copies.put(copy_repository(Path(temporary) / str(job)))

        def unchanged(path: str) -> float:
            """Seconds of the tests without a mutant; they must pass."""
            copy, start = copies.get(), time.monotonic()
            result = run_tests(copy, path, 600)
            copies.put(copy)
            if result != "passed":
                raise SystemExit(f"{' '.join(own_tests(path))}: {result} without any mutant")
            return time.monotonic() - start

        seconds = dict(zip(paths, pool.map(unchanged, paths), strict=True))

        def test(mutant: Mutant) -> str:
            copy = copies.get()
            file = copy / mutant.path
            source = file.read_bytes()
            file.write_bytes(mutant.apply(source))
            result = run_tests(copy, mutant.path, 30 + 4 * seconds[mutant.path])
            file.write_bytes(source)
            copies.put(copy)
            return result

        survivors = 0
        for mutant, (diff, key), result in zip(drawn, described, pool.map(test, drawn), strict=True):
            word = {"failed": "killed", "hung": "killed (hung)", "passed": "SURVIVED"}[result]
            if result == "passed" and key in EXPLAINED:
                word = f"survived, as explained: {EXPLAINED[key]}"
            survivors += word == "SURVIVED"
            print(f"{mutant.path}:{mutant.line} {mutant.function}: {word}\n{diff}", flush=True)
    minutes = (time.monotonic() - begin) / 60
    print(f"{survivors} of {len(drawn)} mutants survived (seed {flags.seed}, {minutes:.1f} minutes)")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
