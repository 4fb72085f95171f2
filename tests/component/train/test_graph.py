"""Micro-batches by a recording: which ones, and that they train as others do. A recording here computes anew."""

import copy

import pytest
import torch

from component.float8.product import quantize_weight, round_weights_for_step
from component.memory.apply import forget_unfinished, liger_runs
from component.train.graph import RECORDINGS, WARM_UP, GraphedSteps, is_uniform
from tests.reference.float8 import float8_card
from tests.reference.plain_path import LAYERS, tiny_model, tiny_nf4_model, under_plan


class Again:
    """As a CUDA graph: nothing happens when it is made; a replay reads and writes the tensors of that time."""

    made = 0

    def __init__(self, compute):
        self.graphs, self.compute, self.result = compute.__self__, compute, torch.zeros(())
        self.inputs = dict(self.graphs._inputs)
        self.gradients = [parameter.grad for parameter in self.graphs._parameters]
        Again.made += 1

    def replay(self):
        graphs, parameters = self.graphs, self.graphs._parameters
        now = graphs._inputs, [parameter.grad for parameter in parameters]
        for inputs, gradients in ((self.inputs, self.gradients), now):
            graphs._inputs = inputs
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            if inputs is self.inputs:
                self.result.copy_(self.compute())
        return self.result


def batch(seed: int, tokens: int = 24, rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (rows, tokens), generator=generator)
    # with skips, and other labels masked in each batch: stale ones would be noticed
    steps = torch.randint(1, 3, (rows, tokens), generator=generator)
    positions = steps.cumsum(1) - steps[:, :1]
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    labels[:, : int(torch.randint(0, tokens // 2, (), generator=generator))] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": positions,
        "labels": ids.clone(),
        "shift_labels": labels,
    }


def loss_of(model):
    def compute(inputs, items):
        with torch.autocast("cuda", torch.bfloat16, enabled=inputs["input_ids"].is_cuda):
            return model(**inputs, num_items_in_batch=items).loss

    return compute


def backward_of(model):
    def train(inputs, items):
        loss = loss_of(model)(inputs, items)
        loss.backward()
        return loss.detach()

    return train


def trained(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model, steps: list[list[dict]], graphs: GraphedSteps | None = None) -> list[float]:
    """Losses of the micro-batches of each step."""
    parameters, losses = trained(model), []
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for step, micro_batches in enumerate(steps):
        round_weights_for_step(step)
        items = torch.stack([(inputs["shift_labels"] != -100).sum() for inputs in micro_batches]).sum()
        for inputs in micro_batches:
            loss = graphs.step(inputs, items) if graphs else None
            if loss is None:
                loss = loss_of(model)(dict(inputs), items)
                loss.backward()
            losses.append(float(loss.detach()))
            del loss  # with it lives what accumulates gradients in this stream, which no other stream can record
        optimizer.step()
        if graphs:
            graphs.forget_gradients()
        else:
            optimizer.zero_grad()
    return losses


@pytest.fixture
def models():
    plain = under_plan(tiny_model(), keep_layers=LAYERS)
    return plain, copy.deepcopy(plain)


def graphed(model, **options) -> GraphedSteps:
    return GraphedSteps(loss_of(model), trained(model), lambda: None, backward_of(model), record=Again, **options)


def assert_same_training(models, steps, replayed: int) -> None:
    plain, other = models
    graphs = graphed(other)
    assert train(other, steps, graphs) == pytest.approx(train(plain, steps), rel=1e-5)
    assert graphs.replayed == replayed
    for found, expected in zip(trained(other), trained(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_trains_as_without(models):
    assert_same_training(models, [[batch(seed)] for seed in range(6)], replayed=6 - WARM_UP)


def test_micro_batches_of_a_step_add_up(models):
    """Recorded at the first micro-batch of a step alone: before, gradients are there already."""
    steps = [[batch(3 * seed + part) for part in range(3)] for seed in range(3)]
    assert_same_training(models, steps, replayed=6)


def test_other_shapes_and_padded_or_packed_rows_are_computed_as_ever(models):
    """In the middle of a step too, whose gradients so far must not be lost."""
    padded, packed = batch(50), batch(51)
    padded["attention_mask"][1, -3:] = 0
    packed["position_ids"][0, 10:] -= packed["position_ids"][0, 10].clone()
    same = [[batch(seed)] for seed in range(4)]
    steps = [*same, [batch(60), padded], *same, [batch(61), batch(62, tokens=17)], *same, [packed], [batch(63)]]
    assert_same_training(models, steps, replayed=2 + 1 + 2 + 1 + 2)


def test_a_step_may_end_with_released_gradients(models):
    """Evaluation releases the recording; it is made anew, from the first step on, and not compared again."""
    plain, other = models
    graphs, before = graphed(other), Again.made
    for first in (0, 4):
        steps = [[batch(first + seed)] for seed in range(4)]
        assert train(other, steps, graphs) == pytest.approx(train(plain, steps), rel=1e-5)
        graphs.release()
    assert Again.made == before + 2
    for found, expected in zip(trained(other), trained(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_setting_that_changed_is_recorded_anew(models):
    setting = [8]
    _, model = models
    graphs = GraphedSteps(loss_of(model), trained(model), lambda: setting[0], backward_of(model), record=Again)
    before = Again.made
    train(model, [[batch(seed)] for seed in range(4)], graphs)
    setting[0] = 16
    train(model, [[batch(seed)] for seed in range(4)], graphs)
    assert Again.made == before + 2


def test_many_evaluations_do_not_end_it(models):
    _, model = models
    graphs = graphed(model)
    for first in range(0, 12 * (RECORDINGS + 4), 12):
        train(model, [[batch(first + seed)] for seed in range(12)], graphs)
        graphs.release()
        graphs.forget_gradients()
    assert graphs.replayed == (RECORDINGS + 4) * (12 - WARM_UP)


@pytest.mark.parametrize("theirs", [None, 0.25])
def test_gradients_that_somebody_replaced(models, theirs):
    """By none, or by tensors of their own: recorded kernels add to the recording's."""
    plain, other = models
    graphs = graphed(other)
    steps = [[batch(seed)] for seed in range(4)]
    train(plain, steps)
    train(other, steps, graphs)
    for parameter in [*trained(plain), *trained(other)]:
        parameter.grad = None if theirs is None else torch.full_like(parameter, theirs)
    last = batch(9)
    items = (last["shift_labels"] != -100).sum()
    graphs.step(last, items)
    backward_of(plain)(dict(last), items)
    for found, expected in zip(trained(other), trained(plain), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


class Wrong(Again):
    """Reads an input as it was when it was recorded, as a number that Python computed would be."""

    def __init__(self, compute):
        super().__init__(compute)
        self.inputs["items"] = self.inputs["items"] + 17


class Louder(Again):
    def replay(self):
        return super().replay() * 1.01


class Failing(Again):
    def __init__(self, compute):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


def failing_first(then):
    """Makes recordings of the class `then`, after a first one that fails."""
    attempts = []

    def record(compute):
        attempts.append(compute)
        if len(attempts) == 1:
            raise RuntimeError("a library was not loaded")
        return then(compute)

    return record


def test_a_recording_is_tried_again(models, capsys):
    plain, other = models
    record = failing_first(Again)
    graphs = GraphedSteps(loss_of(other), trained(other), lambda: None, backward_of(other), record=record)
    steps = [[batch(seed)] for seed in range(8)]
    assert train(other, steps, graphs) == pytest.approx(train(plain, steps), rel=1e-5)
    assert graphs.replayed == 8 - 2 * WARM_UP - 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("record", "reason"),
    [(Wrong, "the loss was"), (Louder, "the loss was"), (Failing, "not permitted when stream is capturing")],
)
def test_a_recording_that_fails_or_differs_is_left_out(models, record, reason, capsys):
    plain, other = models
    graphs = GraphedSteps(loss_of(other), trained(other), lambda: None, backward_of(other), record=record)
    steps = [[batch(seed)] for seed in range(6)]
    assert train(other, steps, graphs) == pytest.approx(train(plain, steps), rel=1e-5)
    assert graphs.replayed == 0
    shown = capsys.readouterr().err
    assert shown.count("cuda_graph: left out from here on; ") == 1
    assert reason in shown


def test_a_recording_that_differs_is_not_tried_again(models, capsys):
    """Even after one that failed."""
    _, model = models

    record = failing_first(Wrong)
    graphs = GraphedSteps(loss_of(model), trained(model), lambda: None, backward_of(model), record=record)
    before = Again.made
    train(model, [[batch(seed)] for seed in range(12)], graphs)
    assert Again.made == before + 1
    assert "the loss was" in capsys.readouterr().err


def test_gradients_that_differ_are_seen(models, capsys):
    _, model = models

    class Halved(Again):
        def replay(self):
            loss = super().replay()
            for parameter in trained(model):
                parameter.grad.mul_(0.5)
            return loss

    graphs = GraphedSteps(loss_of(model), trained(model), lambda: None, backward_of(model), record=Halved)
    train(model, [[batch(seed)] for seed in range(4)], graphs)
    assert graphs.replayed == 0
    assert "the norms of 42 of 42 gradients differ" in capsys.readouterr().err


def test_lengths_that_change_often_are_left_alone(models, capsys):
    """Those that never come three times in a row cost nothing, and are not counted."""
    _, model = models
    graphs, before = graphed(model), Again.made
    lengths = [length for length in range(10, 10 + RECORDINGS + 3) for _ in range(WARM_UP + 1)]
    train(model, [[batch(seed, tokens=10 + seed % 2)] for seed in range(2 * RECORDINGS)], graphs)
    assert Again.made == before
    train(model, [[batch(seed, tokens=length)] for seed, length in enumerate(lengths)], graphs)
    assert Again.made == before + RECORDINGS
    assert (
        capsys.readouterr().err.count(
            "cuda_graph: left out from here on; lengths, padding or documents changed 16 times"
        )
        == 1
    )


def test_is_uniform():
    assert is_uniform(batch(0))
    assert is_uniform({"input_ids": batch(0)["input_ids"]})
    padded, packed = batch(0), batch(0)
    padded["attention_mask"][0, -1] = 0
    packed["position_ids"][1, 5] = 0
    assert not is_uniform(padded)
    assert not is_uniform(packed)


# ---- on a GPU

PLANS = {
    "nothing": {},
    "nothing, in tiles": {"mlp_tile_tokens": 17, "loss_chunk_tokens": 11},
    "offloaded": {"offload_activations": True},
    "attention output, offloaded": {"keep_attention_output": True, "offload_activations": True},
    "attention": {"keep_attention_layers": LAYERS},
    "everything": {"keep_layers": LAYERS},
    "mixed": {"keep_layers": 1, "keep_attention_layers": 1, "mlp_tile_tokens": 7, "loss_chunk_tokens": 32},
}


def on_gpu(model) -> GraphedSteps:
    compute, forget = backward_of(model), lambda: forget_unfinished(model)
    return GraphedSteps(loss_of(model), trained(model), lambda: None, compute, forget)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("frozen_matmul", ["auto", "fp8", "fp8_backward"])
def test_a_cuda_graph_trains_as_kernel_by_kernel(frozen_matmul, plan, tmp_path):
    """In bf16 on an NF4 base, with Liger's kernels, two micro-batches a step; FP8 rounds anew in each step."""
    device = float8_card() if frozen_matmul != "auto" else torch.device("cuda")
    options = {"in_float8": frozen_matmul != "auto", "float8_forward": frozen_matmul == "fp8", "fused": liger_runs()}
    base = tiny_nf4_model(tmp_path, "llama", torch.bfloat16).to(device)
    start = [parameter.detach().clone() for parameter in trained(base)]
    plain, other = (under_plan(copy.deepcopy(base), **options, **plan) for _ in range(2))
    steps = [
        [{name: tensor.to(device) for name, tensor in batch(2 * seed + part, tokens=96).items()} for part in range(2)]
        for seed in range(6)
    ]
    graphs = on_gpu(other)
    # first without a graph: what libraries log at their first call, pytest keeps with the frames, tensors and all
    losses = train(plain, steps)
    assert train(other, steps, graphs) == pytest.approx(losses, rel=5e-3)
    assert graphs.replayed == 12 - WARM_UP
    for found, expected, before in zip(trained(other), trained(plain), start, strict=True):
        assert (found - expected).norm() < 0.02 * (expected - before).norm()
    graphs.release()


@pytest.mark.gpu
def test_a_recording_that_fails_on_the_gpu_is_left_out(tmp_path, capsys):
    """In the middle of a forward pass whose layers offload: what they began is dropped."""
    base = tiny_nf4_model(tmp_path, "llama", torch.bfloat16).to("cuda")
    plain, other = (under_plan(copy.deepcopy(base), offload_activations=True) for _ in range(2))

    def fail(module, *_):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the last layer is not recorded")

    decoder = other.get_base_model().get_decoder()
    decoder.layers[-1].register_forward_pre_hook(fail)
    steps = [[{name: tensor.to("cuda") for name, tensor in batch(seed).items()}] for seed in range(6)]
    graphs = on_gpu(other)
    assert train(other, steps, graphs) == pytest.approx(train(plain, steps), rel=5e-3)
    assert graphs.replayed == 0
    assert "the last layer is not recorded" in capsys.readouterr().err


@pytest.mark.gpu
def test_weights_in_a_graph_are_rounded_anew_in_each_step(tmp_path):
    """The numbers of FP8 that a replay multiplies by are those of the step of the replay, in both directions."""
    base = tiny_nf4_model(tmp_path, "llama", torch.bfloat16).to(float8_card())
    weight = base.get_base_model().get_decoder().layers[0].self_attn.q_proj.get_base_layer().weight
    for transposed in (False, True):
        quantize_weight(weight, transposed=transposed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = quantize_weight(weight, transposed=transposed)
        for step in (1, 7):
            round_weights_for_step(step)
            graph.replay()
            expected = quantize_weight(weight, transposed=transposed)
            assert torch.equal(recorded.scales, expected.scales)
            assert torch.equal(recorded.values.float(), expected.values.float())
    round_weights_for_step(0)
