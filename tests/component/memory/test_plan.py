"""Estimates against independent calculations, and the choice of a plan."""

import dataclasses
import itertools
import math
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from component.attention import shift_short
from component.loss import as_loss_head, eval_chunk, next_token_loss
from component.memory.plan import (
    CHUNKS,
    MEMORY_OPTIONS,
    TILES,
    Estimate,
    MemoryPlan,
    choose_plan,
    describe_estimate,
    estimate,
    minimum_memory_plan,
    next_memory_option,
)
from component.memory.workload import GIB, Workload, attention_backward_bytes, fixed_bytes, sizes
from tests.reference.llama2_7b import HIDDEN, LINEAR, LLAMA2_7B, LORA, MLP, VOCABULARY
from tests.reference.plain_path import plan_of

SMALL = dataclasses.replace(
    LLAMA2_7B, layers=6, weights=6 * LINEAR, trained=6 * LORA
)  # few layers, so few candidate plans
BUDGETS = [1.5, 2, 2.2, 2.5, 3, 3.5, 4, 5, 6, 8, 12, math.inf]
FIELDS = [field.name for field in dataclasses.fields(MemoryPlan)]


def peak(work: Workload, plan: MemoryPlan) -> float:
    return estimate(work, plan).peak_gib


# ---- levels


@pytest.mark.parametrize(
    ("everything", "attention", "expected"),
    [
        (0, 0, "nnnn"), (1, 0, "nnne"), (0, 1, "nnna"), (1, 2, "naae"), (4, 0, "eeee"), (0, 4, "aaaa"),
        (9, 9, "eeee"), (0, 9, "aaaa"), (3, 9, "aeee"),
    ],
)  # fmt: skip
def test_levels(everything, attention, expected):
    """The last layers recompute least: the backward pass frees them first."""
    words = {"n": "nothing", "a": "attention", "e": "everything"}
    plan = plan_of(keep_layers=everything, keep_attention_layers=attention)
    assert plan.levels(4) == [words[letter] for letter in expected]


def test_description():
    plan = MemoryPlan(1, 2, True, True, 2048, 1024)
    assert plan.describe(6) == (
        "activation checkpointing full (inputs and attention outputs offloaded to CPU memory) in 3, selective (MLP "
        "recomputed) in 2, none in 1 of 6 layers; MLP in tiles of 2048 tokens, loss in chunks of 1024"
    )
    plan = MemoryPlan(0, 0, False, False, 0, 256)
    assert plan.describe(6) == (
        "activation checkpointing full (inputs kept on the GPU) in 6 of 6 layers; MLP not tiled, loss in chunks of 256"
    )


def test_description_of_an_estimate():
    expected = Estimate(peak_gib=20.04, host_gib=3.16, cost=1.0, moment="the loss")
    plan = MemoryPlan(6, 0, False, False, 0, 256)
    own = plan.describe(6)
    assert describe_estimate(SMALL, plan, expected, math.inf) == own
    assert describe_estimate(SMALL, plan, expected, 24.0) == (
        f"{own}; estimated peak 20.0 of 24.0 GiB during the loss, 3.2 GiB of pinned CPU memory"
    )
    too_much = describe_estimate(SMALL, plan, dataclasses.replace(expected, host_gib=0.0), 19.0)
    advice = f"It may not fit; to save memory: {MEMORY_OPTIONS['keep_layers']}"
    assert too_much == f"{own}; estimated peak 20.0 of 19.0 GiB during the loss. {advice}"


# ---- estimates


@pytest.mark.parametrize(
    "larger",
    [
        {"tokens": 16384}, {"rank": 128, "trained": 12 * LORA}, {"layers": 12, "weights": 12 * LINEAR},
        {"embeddings": 4 * VOCABULARY * HIDDEN}, {"vocabulary": 4 * VOCABULARY}, {"in_4bit": False}, {"fused": False},
        {"optimizer": "adamw_torch"}, {"mlp": 2 * MLP},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "plan",
    [plan_of(), plan_of(keep_layers=99), plan_of(keep_attention_layers=99), minimum_memory_plan()],
    ids=["n", "e", "a", "l"],
)
def test_a_larger_workload_never_needs_less(larger, plan):
    work = dataclasses.replace(SMALL, **larger)
    assert peak(work, plan) >= peak(SMALL, plan)
    if not larger.keys() & {"vocabulary", "fused", "mlp", "optimizer"}:  # which may not matter at the peak
        assert peak(work, plan) > peak(SMALL, plan)
    assert estimate(dataclasses.replace(SMALL, tokens=16384), plan).cost > estimate(SMALL, plan).cost


def test_each_memory_option_trades_memory_for_time():
    kept, full = plan_of(keep_layers=6), plan_of()
    attention, output = plan_of(keep_attention_layers=6), plan_of(keep_attention_output=True)
    assert peak(SMALL, kept) > peak(SMALL, attention) > peak(SMALL, output) > peak(SMALL, full)
    costs = [estimate(SMALL, plan).cost for plan in (kept, attention, output, full)]
    assert costs == sorted(costs)
    assert costs[0] < costs[1] < costs[2] < costs[3]
    offloaded = plan_of(offload_activations=True)
    assert peak(SMALL, offloaded) < peak(SMALL, full)
    assert estimate(SMALL, offloaded).host_gib * GIB == 6 * 8192 * HIDDEN * 2
    assert estimate(SMALL, full).host_gib == 0
    early, late = (
        plan_of(offload_activations=True, fetch_ahead=ahead, loss_chunk_tokens=256) for ahead in (True, False)
    )
    assert peak(SMALL, late) < peak(SMALL, early)
    assert estimate(SMALL, late).cost > estimate(SMALL, early).cost
    small = {"offload_activations": True, "loss_chunk_tokens": 256}
    inputs, outputs = (peak(SMALL, plan_of(**small, keep_attention_output=keep)) for keep in (False, True))
    assert outputs == pytest.approx(inputs + SMALL.heads * 8192 * 4 * 6 / GIB)  # log-sums; outputs come one at a time
    untiled, tiles = plan_of(loss_chunk_tokens=256), plan_of(loss_chunk_tokens=256, mlp_tile_tokens=1024)
    assert peak(SMALL, tiles) < peak(SMALL, untiled) < peak(SMALL, full)
    assert estimate(SMALL, tiles).cost > estimate(SMALL, untiled).cost > estimate(SMALL, full).cost


def test_differences_between_estimates():
    """All saved activations exist at the loss: offloading saves the inputs of all layers but one."""
    wide = dataclasses.replace(SMALL, vocabulary=50 * VOCABULARY)
    plans = plan_of(), plan_of(offload_activations=True, fetch_ahead=False)
    estimates = [estimate(wide, plan) for plan in plans]
    assert {found.moment for found in estimates} == {"the loss"}
    inputs = (6 - 1) * 8192 * HIDDEN * 2
    assert (estimates[0].peak_gib - estimates[1].peak_gib) * GIB == pytest.approx(inputs, rel=0.03)
    chunks = [peak(wide, plan_of(loss_chunk_tokens=tokens)) for tokens in (4096, 2048)]
    logits = 2048 * 50 * VOCABULARY * (2 + 2 + 4 + 4)  # logits and their gradient, in both dtypes
    assert (chunks[0] - chunks[1]) * GIB == pytest.approx(logits, rel=0.03)


@pytest.mark.parametrize(
    ("options", "copies", "of_backward"),
    [
        ({"keep_layers": 6}, 1, 1),
        ({}, 1, 2),  # gate's forward product is in 16 bits
        ({"mlp_tile_tokens": 1024}, 5, 7),  # gate and up in two layouts, down in one
        ({"mlp_tile_tokens": 1024, "keep_layers": 6}, 3, 6),  # all three in 16 bits, forward
    ],
    ids=str,
)
@pytest.mark.parametrize("in_4bit", [True, False])
@pytest.mark.parametrize("forward", [True, False], ids=["all", "backward"])
def test_copies_in_float8(options, copies, of_backward, in_4bit, forward):
    """In the MLP's backward pass, in bytes per weight; and of a tile's activations, one byte for each number."""
    work = dataclasses.replace(SMALL, tokens=1100, in_4bit=in_4bit, vocabulary=512, mlp=16 * MLP)
    plan, float8 = plan_of(**options, loss_chunk_tokens=256), {"in_float8": True, "float8_forward": forward}
    exact, rounded = (estimate(dataclasses.replace(work, **changes), plan) for changes in ({}, float8))
    assert "MLP" in exact.moment
    assert "MLP" in rounded.moment
    if not forward:  # weights in 16 bits need no copy for forward products
        copies = of_backward if in_4bit else min(copies, 3)
    matrix, tile = HIDDEN * 16 * MLP, options.get("mlp_tile_tokens") or 1100
    dequantized = (1 if options == {"keep_layers": 6} else 3) * 2 * matrix if in_4bit else 0
    expected = (copies if in_4bit else copies + 2) * matrix + tile * 16 * MLP - dequantized
    assert (rounded.peak_gib - exact.peak_gib) * GIB == pytest.approx(expected)


def test_float8_makes_recomputation_cheaper():
    """But not attention: only products with weights are faster; and only backward, if forward ones are in 16 bits."""
    long = dataclasses.replace(SMALL, tokens=131072, group=131072)
    for work, least, most in ((SMALL, 0.6, 0.65), (long, 0.8, 1)):
        exact, rounded = (estimate(dataclasses.replace(work, in_float8=on), plan_of()).cost for on in (False, True))
        assert least < rounded / exact < most
        backward = estimate(dataclasses.replace(work, in_float8=True, float8_forward=False), plan_of()).cost
        assert rounded < backward < exact
    kept = plan_of(keep_layers=6)
    exact, rounded = (estimate(dataclasses.replace(SMALL, in_float8=on), kept).cost for on in (False, True))
    backward = estimate(dataclasses.replace(SMALL, in_float8=True, float8_forward=False), kept).cost
    assert exact - backward == pytest.approx(backward - rounded)  # as much work forward as backward


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 50 * VOCABULARY], ids=["backward", "loss"])
@pytest.mark.parametrize("offload", [False, True])
def test_log_sums_of_kept_attention_outputs(vocabulary, offload):
    """fp32, one for each of 32 heads and 131072 tokens in every layer; they stay on the GPU."""
    wide = dataclasses.replace(SMALL, vocabulary=vocabulary, tokens=131072)
    options = {
        "offload_activations": offload,
        "fetch_ahead": False,
        "mlp_tile_tokens": 1024,
        "loss_chunk_tokens": 1024,
    }
    kept, recomputed = (estimate(wide, plan_of(**options, keep_attention_output=keep)) for keep in (True, False))
    assert kept.moment == recomputed.moment
    outputs = 1 if offload else 6
    if kept.moment != "the loss":  # the output of the layer in the backward pass is counted with its graph
        outputs -= 1
    expected = outputs * 131072 * HIDDEN * 2 + 6 * 131072 * 32 * 4
    assert (kept.peak_gib - recomputed.peak_gib) * GIB == pytest.approx(expected, rel=1e-6)


def peak_bytes(run) -> int:
    """The most that tensors allocated by `run` held at the same time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("chunk", [16, 64, 256])
@pytest.mark.parametrize(("dtype", "trained"), [("bfloat16", False), ("float32", True), ("bfloat16", True)], ids=str)
def test_the_loss_of_a_large_vocabulary_needs_what_is_estimated(chunk, dtype, trained):
    """Logits, their gradients and a trained lm_head, of the size of Qwen2.5's relative to the hidden size.

    A trained head is in 16 bits with ZeRO, else in fp32; activations are in 16 bits.
    """
    hidden, vocabulary, tokens = 128, 5431, 256
    head = torch.nn.Linear(hidden, vocabulary, bias=False, dtype=getattr(torch, dtype)).requires_grad_(trained)
    as_loss_head(head)
    inputs = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens))

    def micro_batch() -> None:
        next_token_loss(inputs, labels, head, None, chunk).backward()

    micro_batch()  # then the head's own gradient exists, which is counted with `trained`
    measured = peak_bytes(micro_batch)
    parameters = hidden * vocabulary
    work = dataclasses.replace(
        LLAMA2_7B, layers=1, weights=0, trained=0, embeddings=0, hidden=hidden, mlp=1, heads=2, kv_heads=1, rank=1,
        head_size=1, group=8, tokens=tokens, vocabulary=vocabulary, head=parameters if trained else 0,
        zero=dtype == "bfloat16",
    )  # fmt: skip
    found = estimate(work, plan_of(loss_chunk_tokens=chunk))
    assert found.moment == "the loss"
    engine = 0.15 + (0.3 if work.zero else 0)
    cast = 4 * parameters if trained else 0  # a CPU casts the 16-bit contribution in a copy, a GPU on the way
    assert 0.5 < measured / ((found.peak_gib - engine) * GIB + cast) <= 1


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8), (28, 4), (9, 3), (15, 5), (4, 1), (14, 2)])
def test_the_heads_of_one_attention_call(heads, kv_heads, monkeypatch):
    """Its gradients are in memory at once: never of more heads than estimated."""
    seen = []
    monkeypatch.setattr(shift_short, "attend_segments", lambda calls, *rest: seen.extend(calls))
    query = torch.empty(1, heads, 8, 2)
    shift_short.attend_in_groups(query, query[:, :kv_heads], query[:, :kv_heads], 4, None, None, 0.0, None)
    largest = max(part.heads.stop - part.heads.start for call in seen for row in call.rows for part in row)
    work = dataclasses.replace(LLAMA2_7B, heads=heads, kv_heads=kv_heads, head_size=2, tokens=8, group=4)
    size = sizes(work)
    per_call = largest / heads * (size.query + 2 * size.key + size.query * 4 / 2)
    assert attention_backward_bytes(work, size) == pytest.approx(2 * size.query + 2 * size.key + per_call)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 8192), (8, 8192), (1, 16)])
def test_k4b_evaluation_is_estimated(rows, tokens):
    found = dataclasses.replace(SMALL, eval_rows=rows, eval_tokens=rows * tokens)
    plan = plan_of(loss_chunk_tokens=1024)
    expected = estimate(found, plan)
    assert estimate(SMALL, plan) == dataclasses.replace(expected, evaluation_gib=0.0)
    n = rows * tokens
    mlp = 5 * n * MLP * 2 + HIDDEN * MLP * 2  # five tensors of the MLP's size, and one dequantized weight
    logits = min(1024, n) * VOCABULARY * (2 + 4 + 4)
    everything = fixed_bytes(SMALL) + 2 * n * HIDDEN * 2 + max(mlp, logits)
    assert expected.evaluation_gib * GIB == pytest.approx(everything + (0.15 + 0.3) * GIB)
    assert expected.metrics["estimated_gib"] == round(max(expected.peak_gib, expected.evaluation_gib), 2)


def test_k4b_an_evaluation_that_may_not_fit_is_told():
    expected = Estimate(peak_gib=20.0, host_gib=0.0, cost=1.0, moment="the loss", evaluation_gib=30.0)
    plan, work = plan_of(), dataclasses.replace(SMALL, eval_rows=8, eval_tokens=8 * 8192)
    line = "Evaluation may not fit: 30.0 GiB; to save memory: "
    assert f"{line}per_device_eval_batch_size: 1" in describe_estimate(work, plan, expected, 24.0)
    one = dataclasses.replace(work, eval_rows=1)
    assert f"{line}shorter samples in eval_file" in describe_estimate(one, plan, expected, 24.0)
    assert line not in describe_estimate(work, plan, expected, 31.0)


def test_k4b_the_loss_chunk_of_evaluation():
    """1024 tokens of all rows together."""
    assert [eval_chunk(1024, rows) for rows in (1, 8, 3, 4096)] == [1024, 128, 341, 1]


# ---- the choice


def test_no_checkpointing_with_enough_memory():
    plan, expected = choose_plan(SMALL)
    assert plan.levels(6) == ["everything"] * 6
    assert (plan.offload_activations, plan.mlp_tile_tokens) == (False, 0)
    assert expected == estimate(SMALL, plan)


def all_plans(layers: int, tokens: int) -> list[MemoryPlan]:
    every = itertools.product(
        range(layers + 1), range(layers + 1), (False, True), (False, True), TILES, CHUNKS, (True, False)
    )
    return [
        plan
        for plan in itertools.starmap(MemoryPlan, every)
        if plan.keep_layers + plan.keep_attention_layers <= layers
        and plan.mlp_tile_tokens < tokens
        and plan.loss_chunk_tokens <= tokens
        and (plan.offload_activations or plan.fetch_ahead)
    ]


@pytest.mark.parametrize("changes", [{}, {"in_float8": True}, {"kv_heads": 1, "zero": False}, {"rows": 2}], ids=str)
def test_it_is_the_best_of_all_plans(changes):
    """Each estimated by itself; at budgets that nothing, some and everything fit in."""
    work = dataclasses.replace(SMALL, layers=3, **changes)
    found = [(plan, estimate(work, plan)) for plan in all_plans(3, work.tokens)]
    peaks = sorted(expected.peak_gib for _, expected in found)
    for budget in (0.0, peaks[0], peaks[len(peaks) // 3], (peaks[0] + peaks[-1]) / 2, math.inf):
        for host in (0.0, 0.1, math.inf):
            allowed = [pair for pair in found if pair[1].host_gib <= host]
            fitting = [pair for pair in allowed if pair[1].peak_gib <= budget]
            best = min((e.cost, e.peak_gib) for _, e in fitting) if fitting else None
            least = min((e.peak_gib, e.cost) for _, e in allowed)
            _, chosen = choose_plan(work, budget, host)
            assert (chosen.cost, chosen.peak_gib) == (best or least[::-1])


def test_more_memory_never_costs_time():
    chosen = [choose_plan(SMALL, budget) for budget in BUDGETS]
    costs = [expected.cost for _, expected in chosen]
    least = min(expected.peak_gib for _, expected in chosen)
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 5
    for budget, (plan, expected) in zip(BUDGETS, chosen, strict=True):
        assert expected.peak_gib <= max(budget, least)
        assert expected == estimate(SMALL, plan)


def test_pinned_cpu_memory_is_limited():
    tight = min(budget for budget in BUDGETS if choose_plan(SMALL, budget)[1].peak_gib <= budget)
    plan, expected = choose_plan(SMALL, tight)
    assert plan.offload_activations
    without, alone = choose_plan(SMALL, tight + 1, host_gib=0.0)
    assert (without.offload_activations, alone.host_gib) == (False, 0.0)
    assert alone.peak_gib <= tight + 1
    plan, expected = choose_plan(SMALL, tight + 1, host_gib=0.2)
    assert expected.host_gib <= 0.2


def test_minimum_memory_if_nothing_fits():
    plan, expected = choose_plan(SMALL, 0.5)
    assert expected.peak_gib > 0.5
    assert plan.levels(6) == ["nothing"] * 6
    assert plan.offload_activations
    assert not plan.keep_attention_output
    assert expected.peak_gib == peak(SMALL, minimum_memory_plan())


def test_kept_gate_and_up_of_other_tiles():
    """With layers that keep them, a tile spares what is computed of it, not what waits."""
    work = dataclasses.replace(SMALL, mlp=64 * MLP, in_4bit=False)
    whole, halved = (estimate(work, plan_of(keep_layers=6, mlp_tile_tokens=tile)) for tile in (0, 4096))
    assert "MLP backward at level everything" in whole.moment
    assert whole.moment == halved.moment
    # of 8192 tokens; of four buffers two are the tile's gate and up, which are there anyway
    spared = 4096 * (2 * 64 * MLP + 2 * HIDDEN - 3 * work.rank) * 2
    assert (whole.peak_gib - halved.peak_gib) * GIB == pytest.approx(spared)


@pytest.mark.parametrize("tokens", [8192, 32768, 131072])
def test_no_plan_needs_less_than_the_minimum(tokens):
    """Of rows this long; what few tokens save needs less memory than weights that are dequantized again."""
    work = dataclasses.replace(SMALL, tokens=tokens, group=tokens // 4, mlp=8 * MLP)
    assert choose_plan(work, 0.0)[1].peak_gib == pytest.approx(peak(work, minimum_memory_plan()))


@pytest.mark.parametrize(
    "options",
    [
        {"keep_layers": 2}, {"keep_layers": 99}, {"keep_attention_layers": 3}, {"keep_attention_output": True},
        {"keep_attention_output": False}, {"offload_activations": False}, {"offload_activations": True},
        {"mlp_tile_tokens": 0}, {"mlp_tile_tokens": 777}, {"loss_chunk_tokens": 13}, {"loss_chunk_tokens": 4096},
        {"keep_layers": 1, "keep_attention_layers": 2, "keep_attention_output": True, "offload_activations": True,
         "mlp_tile_tokens": 3000, "loss_chunk_tokens": 100},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("budget", [1.0, 3.0, math.inf])
def test_options_set_by_the_user_are_kept(options, budget):
    plan, expected = choose_plan(SMALL, budget, **{**dict.fromkeys(MEMORY_OPTIONS), **options})
    assert {name: getattr(plan, name) for name in options} == options
    assert len(plan.levels(6)) == 6
    assert expected.cost >= choose_plan(SMALL, budget)[1].cost or expected.peak_gib > budget


def test_a_few_tokens():
    """Fewer than any tile or chunk."""
    for tokens in (1, 2, 100, 300):
        plan, _ = choose_plan(dataclasses.replace(SMALL, tokens=tokens, group=2), 0.1)
        assert plan.mlp_tile_tokens == 0
        assert plan.loss_chunk_tokens in (tokens, 256)


# ---- advice


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("work", [SMALL, dataclasses.replace(SMALL, tokens=65536)], ids=["8k", "64k"])
def test_the_advice_saves_memory(work, budget):
    """Each step of advice lowers the estimate, until there is none left."""
    plan, _ = choose_plan(work, budget)
    values = {"true": True, "false": False}
    for _ in range(len(MEMORY_OPTIONS) + 1):
        advice = next_memory_option(work, plan)
        name, _, rest = advice.partition(": ")
        if name not in MEMORY_OPTIONS:
            break
        word = rest.split()[0]
        leaner = dataclasses.replace(plan, **{name: values.get(word, int(word) if word.isdigit() else None)})
        assert peak(work, leaner) < 0.99 * peak(work, plan)
        plan = leaner
    assert advice.startswith("deepspeed: ./train_args/deepspeed/deepspeed_config_s2.json")
    offloaded = dataclasses.replace(work, offload_optimizer=True)
    assert peak(offloaded, plan) < peak(work, plan)
    assert next_memory_option(offloaded, minimum_memory_plan()) == "a smaller max_seq_length or lora_rank"
    plain = dataclasses.replace(work, zero=False)
    assert next_memory_option(plain, minimum_memory_plan()) == "a smaller max_seq_length or lora_rank"


def test_memory_options_are_fields_of_plan_and_arguments():
    from component.train.argument import LongQLoRAArguments

    arguments = {field.name for field in dataclasses.fields(LongQLoRAArguments)}
    assert set(FIELDS) - MEMORY_OPTIONS.keys() == {"fetch_ahead"}
    assert MEMORY_OPTIONS.keys() <= arguments
    assert all(words.startswith(f"{name}: ") for name, words in MEMORY_OPTIONS.items())
