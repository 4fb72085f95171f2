"""Seconds of a step, against the recorded ones; FLOP, against those that torch counts; disk, against a run's files."""

import functools
import json
import statistics
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from component.memory.cost import ATTENTION, Rate, checkpoint_bytes, describe_time, full_steps, step_flop, step_seconds
from component.memory.plan import MEMORY_OPTIONS, choose_plan
from component.memory.rate import published_rate
from component.memory.workload import workload
from script.shared.benchmark_row import ON_HOST
from script.shared.random_model import config_of
from script.shared.shape import SHAPES
from tests.conftest import ROOT
from tests.reference.llama2_7b import LLAMA2_7B
from tests.reference.plain_path import GROUP, TOKENS, plan_of, random_batch, tiny_config, tiny_model, under_plan


def recorded_rows():
    """Rows of the benchmarks, with the matrix rate measured beside them."""
    for name in ("benchmark", "benchmark_full_attention", "scaling"):
        results = json.loads((ROOT / f"figure/{name}.json").read_text())
        for at, row in enumerate(results["rows"]):
            if row["kind"].startswith("ours") and "error" not in row and "by_heads" not in row["kind"]:
                label = f"{name}-{at}-{row['size']}-{row['length']}-{row['kind']}"
                is_quick = (name == "benchmark_full_attention" and row["size"] == "7b") or "leanest" in row["kind"]
                marks = [] if is_quick or row["length"] == 8192 else [pytest.mark.slow]
                tflops = row.get("matrix_tflops") or results["matrix_tflops"]
                yield pytest.param(row, tflops, id=label, marks=marks)


RECORDED = list(recorded_rows())
KEPT_UP = 0.91  # of the rate recorded beside them, of some products: a GPU lowers its clocks after 0.1 s of them
# Rows with more CPU memory, or an earlier choice of plans, than the test has: which plan they had is not known
OTHER_PLANS = [("7b", 262144, 30.65), ("13b", 262144, 29.24), ("7b", 524288, 30.27)]


@functools.cache
def chosen_plan(work, budget, host, options):
    return choose_plan(work, budget, host, **dict(options))


@pytest.mark.parametrize(("row", "tflops"), RECORDED)
def test_seconds_of_recorded_steps(row, tflops):
    """Within 15 %, from the matrix rate that was measured beside them and the plan of the same estimate."""
    given, cards, parts = row["settings"], row.get("cards", 1), row["overrides"].get("sequence_parallel_size", 1)
    is_full, ratio = given.get("use_shift_short_attention") is False, given.get("full_attention_ratio", 0)
    work = workload(
        config_of(SHAPES[row["size"]]),
        target_names=None,
        rank=given.get("lora_rank", 64),
        tokens=row["length"] // parts,
        group=row["length"] if is_full else row["length"] // 4,
        fused=given.get("use_liger_kernel", True),
        optimizer=given.get("optim", "paged_adamw_32bit"),
        zero="deepspeed" in given,
        offload_optimizer=given.get("deepspeed") == ON_HOST,
        processes=cards,
        sequence_processes=parts,
        full_steps=is_full or ratio > 0,
    )
    options = tuple((name, given.get(name)) for name in MEMORY_OPTIONS)
    plan, expected = chosen_plan(work, 0.98 * given["memory_budget_gib"], 180 / cards, options)
    is_known = round(expected.peak_gib, 2) == row["estimated_gib"]
    assert is_known != ((row["size"], row["length"], row["estimated_gib"]) in OTHER_PLANS)
    if not is_known:
        return
    attention = ATTENTION * tflops * 1e12
    matrix = KEPT_UP * tflops * 1e12
    rate = replace(published_rate("h200"), matrix=matrix, attention=attention, full_attention=attention)
    first, *seconds = row["step_seconds"]
    assert first > seconds[0], "the first step is warm-up"
    found = {is_full: statistics.median(seconds)}
    if ratio:  # begins with groups, ends with full attention
        found = {False: seconds[0], True: seconds[-1]}
    for full, measured in found.items():
        assert step_seconds(work, plan, rate, full=full) == pytest.approx(measured, rel=0.15)


def test_recorded_rows_have_all_lengths():
    """And nearly all have a known plan."""
    rows = [param.values[0] for param in RECORDED]
    assert {8192, 32768, 131072} <= {row["length"] for row in rows if row["size"] == "7b"}
    assert len(rows) - len(OTHER_PLANS) >= 25


# ---- FLOP


class Products(TorchDispatchMode):
    """Counts the FLOP of matrix products; torch's own counter hooks modules, which a plan's layers call in parts."""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        matrices = {"mm": args[:2], "addmm": args[1:3], "addmm_": args[1:3], "bmm": args[:2]}.get(
            func.overloadpacket.__name__
        )
        if matrices:
            left, right = matrices
            self.flop += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "options",
    [
        {"keep_layers": 3},
        {"keep_attention_layers": 3},
        {"keep_layers": 1, "keep_attention_layers": 1},
        {"keep_attention_output": True},
        {"mlp_tile_tokens": 16, "loss_chunk_tokens": 10},
    ],
    ids=str,
)
@pytest.mark.parametrize("changes", [{}, {"train_embedding": True}], ids=["lora", "head"])
def test_flop_equal_those_that_torch_counts(family, options, changes):
    """Matrix products of a training step under each plan; grouped-query models, biases, a trained head."""
    model = under_plan(tiny_model(family, **changes), **options)
    model.enable_input_require_grads()  # else the first layer computes no gradient of its input
    work = workload(tiny_config(family), target_names=None, rank=4, tokens=TOKENS, group=GROUP, **changes)
    found = step_flop(work, plan_of(**options))
    model.train()
    with Products() as counted:
        model(**random_batch()).loss.backward()
    # what is recomputed of LoRA is taken for the share of what is recomputed of the weights
    tolerance = 1e-9 if found.passes == 2 else 0.006
    assert counted.flop == pytest.approx(found.products + found.lora, rel=tolerance)


@pytest.mark.parametrize(
    ("tokens", "parts", "rows", "group"), [(32, 1, 1, 8), (32, 1, 2, 8), (16, 2, 1, 8), (32, 1, 1, 32)]
)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("output", [False, True])
def test_attention_is_counted_pair_by_pair(tokens, parts, rows, group, full, output):
    """Forward 4 D FLOP for each pair in each head, backward 10 D, and the forward again unless its output is kept."""
    work = replace(LLAMA2_7B, tokens=tokens, sequence_processes=parts, rows=rows, group=group, layers=3)
    length, pairs = tokens * parts // rows, 0.0
    for shift in (0, group // 2):
        for query in range(length):
            seen = [key for key in range(query + 1) if (query + shift) // group == (key + shift) // group]
            pairs += (query + 1 if full or group == length else len(seen)) / 2
    expected = pairs * rows / parts * 32 * 128 * 3 * (4 + 10 + (0 if output else 4))
    found = step_flop(work, plan_of(keep_attention_output=output), full=full).attention
    assert found == pytest.approx(expected)


# ---- time and disk


RATE = Rate(matrix=100e12, attention=70e12, full_attention=70e12, bandwidth=1e12, link=25e9)


def test_copies_cost_time_only_where_computation_does_not_hide_them():
    plan = plan_of(offload_activations=True)
    slow, fast = (step_seconds(LLAMA2_7B, plan, replace(RATE, link=link)) for link in (0.1e9, 25e9))
    moved = 32 * 8192 * 4096 * 2
    busy = fast - 0.041
    flop = step_flop(LLAMA2_7B, plan)
    assert fast == step_seconds(LLAMA2_7B, plan_of(), RATE)
    assert slow - fast == pytest.approx(2 * (moved / 0.1e9 - busy / flop.passes))
    late = step_seconds(LLAMA2_7B, replace(plan, fetch_ahead=False), RATE)
    assert late - fast == pytest.approx(moved / 25e9)


def test_attention_outputs_have_less_time_to_come_back():
    """That of q, k and v: recomputed, and their gradients in the layer above; a quarter of a layer's weights."""
    plan = plan_of(offload_activations=True, keep_attention_output=True)
    quick, slow = (step_seconds(LLAMA2_7B, plan, replace(RATE, link=link)) for link in (1e12, 2e9))
    a_pass = (quick - 0.041) / step_flop(LLAMA2_7B, plan).passes
    moved, share = 32 * 8192 * 4096 * 2, 3 * 4096**2 / (4 * 4096**2 + 3 * 4096 * 11008)
    assert moved / 2e9 > 2 * a_pass * share  # late; the inputs are not
    assert 2 * moved / 2e9 > a_pass
    hidden_copies = 2 * (2 * moved / 2e9 - a_pass)
    assert slow - quick == pytest.approx(hidden_copies + moved / 2e9 - 2 * a_pass * share)


@pytest.mark.parametrize("head", [0, 32000 * 4096], ids=["frozen", "trained"])
def test_products_in_float8(head):
    """Twice as fast but for LoRA's and the head's; and activations are quantized in memory."""
    quick = replace(RATE, float8=200e12, bandwidth=1e30)
    exact = replace(LLAMA2_7B, head=head, trained=LLAMA2_7B.trained + 2 * head, embeddings=2 * head)
    rounded, flop = replace(exact, in_float8=True), step_flop(exact, plan_of())
    saved = step_seconds(exact, plan_of(), quick) - step_seconds(rounded, plan_of(), quick)
    products = 8192 * 2 * 32 * (3 * (4 * 4096**2 + 3 * 4096 * 11008) - 4096 * 11008)  # down is not recomputed
    assert saved == pytest.approx(products * (1 / 100e12 - 1 / 200e12))
    assert flop == step_flop(rounded, plan_of())
    slow = replace(quick, bandwidth=1e12)
    written = step_seconds(rounded, plan_of(), slow) - step_seconds(exact, plan_of(), slow) + saved
    quantized = 8192 * 32 * (4 * 4096 + 1.5 * 11008) * (2 + 1)  # in a pass over the layers, on average
    halved = 4 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # bytes of weights that are one byte instead of two
    assert written * 1e12 == pytest.approx(flop.passes * (quantized - halved))


def test_gradients_of_activations_in_float8():
    """The backward pass is twice as fast, and turns its share of weights and activations into FP8."""
    quick = replace(RATE, float8=200e12, bandwidth=1e30)
    backward = replace(LLAMA2_7B, in_float8=True, float8_forward=False)
    saved = step_seconds(LLAMA2_7B, plan_of(), quick) - step_seconds(backward, plan_of(), quick)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert saved == pytest.approx(2 * 8192 * weights * (1 / 100e12 - 1 / 200e12))
    slow = replace(quick, bandwidth=1e12)
    written = step_seconds(backward, plan_of(), slow) - step_seconds(LLAMA2_7B, plan_of(), slow) + saved
    quantized = 8192 * 32 * (5 * 4096 + 2 * 11008) * (2 + 1)
    assert written * 1e12 == pytest.approx(quantized - 4 * weights)
    # weights in 16 bits become FP8 in the backward pass, and nothing before
    plain = replace(LLAMA2_7B, in_4bit=False)
    more = replace(plain, in_float8=True, float8_forward=False)
    written = step_seconds(more, plan_of(), slow) - step_seconds(plain, plan_of(), slow) + saved
    assert written * 1e12 == pytest.approx(quantized + 4 * (2 + 1) * weights)


def test_short_rows_take_as_long_as_launching_their_kernels():
    work = replace(LLAMA2_7B, tokens=64, group=16)
    assert step_seconds(work, plan_of(), RATE, micro_batches=4) == pytest.approx(4 * 32 * 9e-3 + 0.041)
    at_once = step_seconds(work, plan_of(), RATE, micro_batches=4, cuda_graph=True)
    assert 0.041 < at_once < 0.9
    long = replace(LLAMA2_7B, tokens=32768, group=8192)
    assert step_seconds(long, plan_of(), RATE, cuda_graph=True) == step_seconds(long, plan_of(), RATE)


def test_full_steps_are_those_of_the_callback():
    assert [full_steps(1000, ratio) for ratio in (0, 0.1, 1e-6, 1)] == [0, 100, 1, 1000]


def test_hours_of_both_kinds_of_steps():
    work = replace(LLAMA2_7B, tokens=131072, group=32768, full_steps=True)
    options = {"steps": 1000, "micro_batches": 4, "full_ratio": 0.1}
    line, found = describe_time(work, plan_of(), RATE, is_full=False, **options)
    assert found["seconds_per_full_step"] > 2 * found["seconds_per_step"]
    assert found["hours"] * 3600 == pytest.approx(
        900 * found["seconds_per_step"] + 100 * found["seconds_per_full_step"]
    )
    assert "in the last 100 with full attention" in line
    _, full = describe_time(work, plan_of(), RATE, is_full=True, **options)
    assert full == {"seconds_per_step": found["seconds_per_full_step"], "hours": pytest.approx(full["hours"])}
    assert full["hours"] * 3600 == pytest.approx(1000 * full["seconds_per_step"])


@pytest.mark.parametrize(("done", "short", "long"), [(850, 50, 100), (900, 0, 100), (980, 0, 20), (1000, 0, 0)])
def test_hours_of_a_resumed_run_are_of_the_steps_left(done, short, long):
    work = replace(LLAMA2_7B, tokens=131072, group=32768, full_steps=True)
    options = {"steps": 1000, "micro_batches": 4, "full_ratio": 0.1, "is_full": False}
    _, whole = describe_time(work, plan_of(), RATE, **options)
    line, left = describe_time(work, plan_of(), RATE, done=done, **options)
    seconds = short * whole["seconds_per_step"] + long * whole["seconds_per_full_step"]
    assert left["hours"] * 3600 == pytest.approx(seconds)
    assert f"h for the {short + long} steps left of 1000, of full rows" in line


def test_disk_of_a_checkpoint_without_deepspeed(tmp_path):
    """PEFT's adapter and torch's optimizer."""
    model = tiny_model()
    config = tiny_config()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(**random_batch()).loss.backward()
    optimizer.step()
    tensors = sum(p.nbytes + sum(s.nbytes for s in optimizer.state[p].values() if s.dim()) for p in trained)
    work = workload(config, target_names=None, rank=4, tokens=TOKENS, group=GROUP, zero=False, optimizer="adamw_torch")
    assert checkpoint_bytes(work) == tensors
    assert checkpoint_bytes(work, only_model=True) == sum(p.nbytes for p in trained)
