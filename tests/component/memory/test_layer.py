"""Decoder layers at each checkpointing level: dropout, tiles, gradient hooks, and what they hold in memory."""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

from component.attention import kernel
from component.attention.interface import use_shift_short_attention
from component.attention.shift_short import SavedAttention
from component.memory import linear
from component.memory.layer import LeanLayer, RngAndAutocastState, lean_layers
from component.memory.offload import ActivationOffloader
from tests.reference.plain_path import (
    LAYERS,
    TOKENS,
    assert_same,
    differs,
    gradients,
    random_batch,
    tiny_base,
    tiny_config,
    tiny_model,
    train_pass,
    under_plan,
    with_lora,
)

ALL = {
    "keep_layers": 1,
    "keep_attention_layers": 1,
    "keep_attention_output": True,
    "offload_activations": True,
    "mlp_tile_tokens": 7,
    "loss_chunk_tokens": 11,
}
LEVELS = {
    "nothing": {},
    "nothing, offloaded": {"offload_activations": True},
    "attention output, offloaded": {"keep_attention_output": True, "offload_activations": True},
    "attention": {"keep_attention_layers": LAYERS},
    "everything": {"keep_layers": LAYERS},
    "mixed": {"keep_layers": 1, "keep_attention_layers": 1},
}
levels = pytest.mark.parametrize("memory_options", LEVELS.values(), ids=LEVELS)


# ---- dropout


@pytest.mark.parametrize("tile", [0, 17])
def test_recomputing_draws_the_same_dropout_masks(tile):
    """Same results as without recomputation."""
    model = tiny_model(dropout=0.3)
    lean = under_plan(model, keep_layers=LAYERS, mlp_tile_tokens=tile)
    kept = train_pass(lean, random_batch(2))
    assert differs(kept, train_pass(lean, random_batch(2), seed=5))
    for memory_options in LEVELS.values():
        assert_same(train_pass(under_plan(model, mlp_tile_tokens=tile, **memory_options), random_batch(2)), kept)


def reference_forward(self, x, *args, **kwargs):
    """A fused layer's forward in plain autograd operations: y = W x + b + s B A (mask * x)."""
    projection = self.projection
    seed = projection.draw_seed()
    flat = x.reshape(-1, x.shape[-1])
    mask = linear._drop(torch.ones_like(flat.detach()), projection.dropout, seed)
    a, b = projection.factors
    y = projection.base(flat) + projection.scaling * (flat * mask) @ a.t() @ b.t()
    return y.view(*x.shape[:-1], -1)


@levels
def test_dropout_in_a_model_against_the_formula(memory_options, monkeypatch):
    """Hugging Face's layers with the formula for LoRA draw masks in the same order: q k v o gate up."""
    model = tiny_model(dropout=0.3, target_names=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"])
    plain = copy.deepcopy(model)
    linear.fuse_lora(plain)
    found = train_pass(under_plan(model, **memory_options), random_batch(2))
    monkeypatch.setattr(linear.FusedLoRALayer, "forward", reference_forward)
    assert_same(found, train_pass(plain, random_batch(2)))


@pytest.mark.parametrize("s2", [True, False], ids=["S2", "full"])
def test_dropout_of_attention_weights(s2):
    model = tiny_model(s2=s2, changes={"attention_dropout": 0.2})
    kept = train_pass(under_plan(model, keep_layers=LAYERS), random_batch(2))
    for memory_options in LEVELS.values():
        assert_same(train_pass(under_plan(model, **memory_options), random_batch(2)), kept)
    without = tiny_model(s2=s2)
    assert differs(train_pass(under_plan(without, keep_layers=LAYERS), random_batch(2)), kept)


@pytest.mark.parametrize("memory_options", [{}, {"mlp_tile_tokens": 17}, {"keep_layers": LAYERS}, ALL], ids=str)
def test_each_call_has_its_own_mask_in_forward_and_backward(monkeypatch, memory_options):
    """Seeds differ between layers, projections, tiles and calls; the backward pass reuses the forward pass's."""
    seeds = []
    drop = linear._drop
    monkeypatch.setattr(linear, "_drop", lambda x, p, seed: seeds.append((seed, *x.shape)) or drop(x, p, seed))
    lean = under_plan(tiny_model(dropout=0.3), **memory_options).train()
    seen = set()
    for _ in range(2):
        seeds.clear()
        loss = lean(**random_batch()).loss
        forward = list(seeds)
        seeds.clear()
        loss.backward()
        tile = memory_options.get("mlp_tile_tokens") or TOKENS
        assert len(forward) == len({seed for seed, *_ in forward}) == LAYERS * (4 + 3 * -(-TOKENS // tile))
        assert None not in {seed for seed, *_ in forward}
        assert set(seeds) == set(forward)
        assert not seen & set(forward)
        seen |= set(forward)


def test_restoring_the_rng_state_repeats_a_pass():
    """As in a resumed run; and the backward pass does not change the RNG state."""
    lean = under_plan(tiny_model(dropout=0.3), **ALL).train()
    first = train_pass(lean, random_batch(), random_batch(seed=8), seed=12)
    torch.manual_seed(12)
    lean.zero_grad(set_to_none=True)
    loss = lean(**random_batch()).loss
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    torch.rand(5)
    torch.set_rng_state(state)
    second = lean(**random_batch(seed=8)).loss
    second.backward()
    assert_same(([loss.item(), second.item()], gradients(lean)), first, tolerance=0)


def test_the_plan_does_not_change_the_rng_state():
    """Plans with the same tiles draw the same masks."""
    model = tiny_model(dropout=0.3)
    states = []
    for memory_options in LEVELS.values():
        train_pass(under_plan(model, **memory_options), random_batch())
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


# ---- gradient hooks, for DDP and ZeRO


@levels
def test_each_gradient_is_accumulated_once(memory_options):
    model = tiny_model("qwen3", train_norm=True, train_embedding=True)
    lean = under_plan(model, mlp_tile_tokens=7, **memory_options)
    arrived: list[str] = []
    for name, parameter in lean.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    names = sorted(name for name, parameter in lean.named_parameters() if parameter.requires_grad)
    train_pass(lean, random_batch())
    assert sorted(arrived) == names
    train_pass(lean, random_batch(), random_batch(seed=8))
    assert sorted(arrived) == sorted(3 * names)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@levels
def test_ddp(process_group, memory_options):
    model = tiny_model(train_norm=True)
    batches = random_batch(), random_batch(seed=8)
    plain = train_pass(model, *batches)
    wrapped = DistributedDataParallel(under_plan(model, mlp_tile_tokens=7, **memory_options))
    losses, found = train_pass(wrapped, *batches)
    assert_same((losses, {name.removeprefix("module."): gradient for name, gradient in found.items()}), plain)


# ---- memory


def hidden_states(model) -> list[weakref.ref]:
    """Filled by a forward pass with references to the inputs of all decoder layers but the first."""
    found: list[weakref.ref] = []
    for layer in model.get_base_model().model.layers[1:]:
        layer.register_forward_pre_hook(lambda _, args: found.append(weakref.ref(args[0])))
    return found


def test_offloaded_inputs_are_freed():
    for offload in (True, False):
        lean = under_plan(tiny_model(), offload_activations=offload, keep_attention_output=True).train()
        found = hidden_states(lean)
        loss = lean(**random_batch()).loss
        assert [reference() is None for reference in found] == [offload] * (LAYERS - 1)
        loss.backward()
        assert all(reference() is None for reference in found)


@pytest.mark.parametrize("s2", [True, False], ids=["S2", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_output_of_the_layer_below_is_fetched_after_attention(family, s2, monkeypatch):
    """Its input already before; and the output is freed by then."""
    config, log = tiny_config(family, s2=s2), []
    if not s2:
        use_shift_short_attention(config, None)
    lean = under_plan(with_lora(tiny_base(config)), keep_attention_output=True, offload_activations=True)
    backward, take = kernel.attention_backward, SavedAttention.take
    outputs: list[StorageWeakRef] = []

    def take_and_watch(saved):
        out = take(saved)
        outputs.append(StorageWeakRef(out.untyped_storage()))
        return out

    def fetch_rest(offloader):
        entry = offloader._entries[-1] if offloader._entries else None
        log.append(f"{len(entry.fetched)} ahead" if entry else "none below")
        assert outputs[-1].expired()
        fetch(offloader)
        assert entry is None or len(entry.fetched) == 2

    fetch = ActivationOffloader.fetch_rest
    monkeypatch.setattr(ActivationOffloader, "fetch_rest", fetch_rest)
    monkeypatch.setattr(SavedAttention, "take", take_and_watch)
    monkeypatch.setattr(kernel, "attention_backward", lambda *a, **how: log.append("attention") or backward(*a, **how))
    train_pass(lean, random_batch())
    assert len(outputs) == 2 * LAYERS  # taken to be offloaded, and again
    steps = [line for line, before in zip(log, ["", *log[:-1]], strict=True) if line != before]
    assert steps == ["attention", "1 ahead"] * (LAYERS - 1) + ["attention", "none below"]


def bytes_in_tensors() -> int:
    """Of floating-point tensors; RNG states do not count."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.is_floating_point()]
    tensors = [tensor for tensor in tensors if tensor.layout == torch.strided]  # of other tests
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def test_the_backward_pass_frees_what_layers_saved():
    """Even while the loss, and with it the graph, still exists."""
    lean = under_plan(tiny_model(), mlp_tile_tokens=17, keep_attention_output=True, **LEVELS["mixed"])
    train_pass(lean, random_batch())
    lean.zero_grad(set_to_none=False)
    before = bytes_in_tensors()
    loss = lean(**random_batch()).loss
    assert bytes_in_tensors() - before > 200_000
    loss.backward()
    assert bytes_in_tensors() - before < TOKENS * 64 * 4  # one layer's hidden states: cos, sin and log-sum-exp


def test_tiles_change_nothing():
    """Neither losses nor gradients, which are computed in place."""
    model = tiny_model(train_norm=True)
    expected = train_pass(model, random_batch(2))
    for tile in (2, TOKENS, 2 * TOKENS - 1, 2 * TOKENS):
        assert_same(train_pass(under_plan(model, mlp_tile_tokens=tile), random_batch(2)), expected)


@levels
def test_a_loss_of_several_layers(memory_options):
    """Gradients of hidden states with several consumers add up."""

    def all_layers(model):
        model.train().zero_grad(set_to_none=True)
        outputs = model(input_ids=random_batch()["input_ids"], output_hidden_states=True)
        for state in outputs.hidden_states:
            if state.requires_grad:
                state.retain_grad()
        loss = sum((state * (number + 1)).tanh().sum() for number, state in enumerate(outputs.hidden_states))
        loss.backward()
        return [loss.item()], gradients(model)

    model = tiny_model()
    assert_same(all_layers(under_plan(model, **memory_options)), all_layers(model))


# ---- supported layers


def test_lean_layers_subclass_the_models_own():
    model = tiny_model().get_base_model()
    linear.fuse_lora(model)
    own = type(model.model.layers[0])
    layers = lean_layers(model)
    assert len(layers) == LAYERS
    assert all(isinstance(layer, LeanLayer) and isinstance(layer, own) for layer in layers)
    assert layers == list(model.model.layers)


def test_an_mlp_with_trainable_base_weights_is_unsupported():
    model = tiny_model().get_base_model()
    model.model.layers[1].mlp.up_proj.base_layer.weight.requires_grad_(True)
    assert lean_layers(model) == []
    assert not any(isinstance(module, LeanLayer) for module in model.modules())


def test_rng_and_autocast_state():
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        state = RngAndAutocastState(torch.device("cpu"))
    drawn = torch.rand(3)
    rng_state = torch.get_rng_state()
    with state.restored():
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.equal(torch.rand(3), drawn)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), rng_state)
