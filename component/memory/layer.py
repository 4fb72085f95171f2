"""What does a decoder layer save for its backward pass?

The memory plan gives each layer one of three levels:

    nothing      full activation checkpointing: saves its input, on the GPU or in CPU memory, and recomputes the rest
    attention    selective activation checkpointing: saves what attention needs, and recomputes the MLP from its input
    everything   no activation checkpointing: saves what attention needs and the MLP's gate and up projections; only
                 norms and activation functions are recomputed

At every level the MLP runs in tiles of tokens, its down projection is not recomputed (no gradient needs its output),
and the gradient of each weight is returned once per backward pass, as the hooks of ZeRO and DDP expect.

Shapes: B batch, T tokens, N = B T, H hidden size.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from transformers import PretrainedConfig

from component.attention.shift_short import SavedAttention
from component.memory.linear import Gradients, LoRALinear, as_returned, to_autocast_dtype
from component.memory.offload import ActivationOffloader
from component.memory.shared_input import SharedInputLinears
from component.model import without_weights

LEVELS = ("nothing", "attention", "everything")
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


class LeanLayer(nn.Module):
    """Mixed into the class of a decoder layer: trains at `level`; in evaluation it is Hugging Face's layer."""

    level: str = "everything"
    tile: int = 0  # tokens per MLP tile; 0: no tiling
    keeps_attention_output: bool = False  # at level `nothing`: attention's kernel runs once
    offloader: ActivationOffloader | None = None  # of what level `nothing` saves; None: kept on the GPU

    def prepare(self) -> None:
        """Look up once what every forward pass needs; the adapter must be in place."""
        self.fused_mlp = FusedMLP(self)
        dropouts = [m.p for m in self.modules() if isinstance(m, nn.Dropout)]
        self.uses_rng = any(dropouts) or bool(getattr(self.self_attn, "attention_dropout", 0.0))

    def forward(self, hidden_states: Tensor, **call) -> Tensor:
        if not self.training or not torch.is_grad_enabled():
            return super().forward(hidden_states, **call)
        mlp, tile = self.fused_mlp, self.tile or hidden_states.shape[:-1].numel()
        if self.level == "nothing":
            call |= {"past_key_values": None, "use_cache": False}  # recomputing would append to a cache twice
            attention = [*_trainable(self.input_layernorm), *_trainable(self.self_attn)]
            return _RecomputedLayer.apply(hidden_states, self, call, tile, len(attention), *attention, *mlp.parameters)
        hidden = self.attend(hidden_states, call)
        return _MLP.apply(hidden, mlp, tile, self.level == "everything", *mlp.parameters)

    def attend(self, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        """The attention half of the layer, (B, T, H): x + attention(norm(x))."""
        return hidden + self.self_attn(self.input_layernorm(hidden), **call)[0]

    @contextmanager
    def fetching_after_attention(self) -> Iterator[None]:
        """What the layer below offloaded is fetched once the backward pass of this call's attention is through.

        That is when the gradient of its queries is there; queries, keys, values and the output are freed by then.
        """
        if (offloader := self.offloader) is None:
            yield
            return

        def follow(module: nn.Module, inputs: tuple, queries: Tensor) -> None:
            if queries.requires_grad:
                queries.register_hook(lambda gradient: offloader.fetch_rest())

        hook = self.self_attn.q_proj.register_forward_hook(follow)
        try:
            yield
        finally:
            hook.remove()


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def lean_layers(model: nn.Module) -> list[LeanLayer]:
    """Mix `LeanLayer` into all decoder layers of `model`; empty if one is unsupported (see `LAYERS`)."""
    layers = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    if not all(_is_supported(layer) for layer in layers):
        return []
    for layer in layers:
        layer.__class__ = type(f"Lean{type(layer).__name__}", (LeanLayer, type(layer)), {})
        layer.prepare()
    return layers


def supports_layers_of(config: PretrainedConfig) -> bool:
    """Whether `lean_layers` supports the decoder layers of the model of `config`, without its weights."""
    names = {type(module).__name__ for module in without_weights(config).modules()}
    layers = {name for name in names if name.endswith("DecoderLayer")}
    return bool(layers) and layers <= set(LAYERS)


def _is_supported(layer: nn.Module) -> bool:
    if type(layer).__name__ not in LAYERS:
        return False
    return all(LoRALinear.supports(getattr(layer.mlp, name)) for name in ("gate_proj", "up_proj", "down_proj"))


class FusedMLP:
    """The MLP half of a layer, h + down(act(gate(n)) * up(n)) with n = norm(h), forward and backward in tiles."""

    def __init__(self, layer: nn.Module):
        mlp = layer.mlp
        self.norm = layer.post_attention_layernorm
        self.activate = lambda gate, up: mlp.act_fn(gate) * up  # replaced by Liger's kernel where it is available
        self.gate, self.up, self.down = (LoRALinear(p) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.inputs = SharedInputLinears([self.gate, self.up])

    def use_float8(self, *, forward: bool = True) -> None:
        for projection in (self.gate, self.up, self.down):
            projection.use_float8(forward=forward)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones."""
        return [*_trainable(self.norm), *self.gate.parameters, *self.up.parameters, *self.down.parameters]

    def forward(self, hidden: Tensor, tile: int, keep: bool) -> tuple[Tensor, list[dict]]:
        """(B, T, H) -> the same shape, and for each tile what `backward` needs; with gate and up if `keep`."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        out, kept, tiles = torch.empty_like(flat), [], _tiles(len(flat), tile)
        with self._holding_weights(uses=len(tiles)):
            for start, end in tiles:
                saved: dict[str, Any] = {
                    "seeds": {name: getattr(self, name).draw_seed() for name in ("gate", "up", "down")}
                }
                normed = to_autocast_dtype(self.norm(flat[start:end]))
                saved["dtype"] = normed.dtype  # autocast is off during the backward pass
                gate, up = self._gate_and_up(normed, saved)
                product, low = self.down.forward(self.activate(gate[0], up[0]), saved["seeds"]["down"])
                torch.add(flat[start:end], product, out=out[start:end])
                if keep:
                    saved |= {"gate": gate, "up": up, "low": low}
                kept.append(saved)
        return out.view(hidden.shape), kept

    def backward(
        self, hidden: Tensor, grad: Tensor, tile: int, kept: list[dict], sums: Gradients, in_place: bool
    ) -> Tensor:
        """dL/dh (B, T, H) from dL/dy, overwriting dL/dy if `in_place`; weight gradients are added to `sums`."""
        flat, grad_flat = hidden.reshape(-1, hidden.shape[-1]), grad.reshape(-1, grad.shape[-1])
        out, tiles = grad_flat if in_place else torch.empty_like(flat), _tiles(len(flat), tile)
        # in FP8, the recomputed forward products and those of the gradients use different copies of a weight
        is_reused = "gate" not in kept[0] and not self.gate.float8_backward
        with self._holding_weights(uses=2 * len(tiles) if is_reused else len(tiles)):
            for (start, end), saved in zip(tiles, kept, strict=True):
                self._tile_backward(flat[start:end], grad_flat[start:end], saved, sums, out[start:end])
                saved.clear()
        return out.view(hidden.shape)

    def _tile_backward(self, hidden: Tensor, grad: Tensor, saved: dict, sums: Gradients, out: Tensor) -> None:
        seeds = saved["seeds"]
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            normed_graph = self.norm(leaf).to(saved["dtype"])
        normed = normed_graph.detach()
        gate, up = (saved["gate"], saved["up"]) if "gate" in saved else self._gate_and_up(normed, saved)
        with torch.enable_grad():
            leaves = [gate[0].requires_grad_(), up[0].requires_grad_()]
            active = self.activate(*leaves)
        detached = active.detach()
        low = saved["low"] if "low" in saved else self.down.low(detached, seeds["down"])
        grad_active = self.down.backward(grad.to(detached.dtype), detached, low, seeds["down"], sums)
        grad_gate, grad_up = torch.autograd.grad(active, leaves, grad_active)
        del active, detached, grad_active
        of_inputs = [seeds["gate"], seeds["up"]]
        grad_normed = self.inputs.backward([grad_gate, grad_up], normed, [gate[1], up[1]], of_inputs, sums)
        norm_weights = _trainable(self.norm)
        through_norm, *norm_gradients = torch.autograd.grad(
            normed_graph, [leaf, *norm_weights], grad_normed.to(normed_graph.dtype)
        )
        for parameter, gradient in zip(norm_weights, norm_gradients, strict=True):
            sums[parameter] = sums[parameter] + gradient.float() if parameter in sums else gradient.float()
        torch.add(grad, through_norm, out=out)

    def _gate_and_up(self, normed: Tensor, saved: dict) -> tuple[tuple, tuple]:
        gate, up = self.inputs.forward(normed, [saved["seeds"]["gate"], saved["seeds"]["up"]])
        return gate, up

    @contextmanager
    def _holding_weights(self, uses: int) -> Iterator[None]:
        with ExitStack() as stack:
            for projection in (self.gate, self.up, self.down) if uses > 1 else ():
                stack.enter_context(projection.holding_weight())
            yield


def _tiles(tokens: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class _MLP(torch.autograd.Function):
    """`FusedMLP` at levels `attention` and `everything`: saves h, and with `keep` gate and up as well."""

    @staticmethod
    def forward(ctx, hidden: Tensor, mlp: FusedMLP, tile: int, keep: bool, *trained: nn.Parameter) -> Tensor:
        out, ctx.kept = mlp.forward(hidden, tile, keep)
        ctx.mlp, ctx.tile, ctx.trained = mlp, tile, trained
        ctx.save_for_backward(hidden)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        sums: Gradients = {}
        (hidden,) = ctx.saved_tensors
        dx = ctx.mlp.backward(hidden, grad, ctx.tile, ctx.kept, sums, in_place=False)
        return dx, None, None, None, *as_returned(sums, ctx.trained)


class _RecomputedLayer(torch.autograd.Function):
    """A layer at level `nothing`: saves its input, and attention's output if asked, on the GPU or offloaded.

    The first `n_attention` of the trained parameters belong to the layer's attention half.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, layer: LeanLayer, call: dict, tile: int, n_attention: int, *trained):
        ctx.layer, ctx.call, ctx.tile, ctx.n_attention, ctx.trained = layer, call, tile, n_attention, trained
        ctx.state = RngAndAutocastState(hidden.device, layer.uses_rng)
        ctx.attention, ctx.has_output = SavedAttention() if layer.keeps_attention_output else None, False
        if ctx.attention is not None:
            ctx.call = call = {**call, "saved_attention": ctx.attention}
        middle = layer.attend(hidden, call)
        out, ctx.kept = layer.fused_mlp.forward(middle, tile, keep=False)
        if layer.offloader is None:
            ctx.fetch = lambda: iter([hidden])
            return out
        saved, ctx.has_output = [hidden], ctx.attention is not None and ctx.attention.is_filled
        if ctx.has_output:
            saved.append(ctx.attention.take())
        ctx.fetch = layer.offloader.put(saved)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        arriving, ctx.fetch = ctx.fetch(), None
        hidden = next(arriving)
        if ctx.has_output:
            ctx.attention.fetch = partial(next, arriving)  # still on its way while q, k and v are recomputed
        layer, attention_parameters = ctx.layer, ctx.trained[: ctx.n_attention]
        sums: Gradients = {}
        with ctx.state.restored(), torch.enable_grad(), layer.fetching_after_attention():
            leaf = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
            middle = layer.attend(leaf, ctx.call)
        # Only this layer reads the incoming gradient, so it can be overwritten. That saves one tensor at the peak, as
        # does freeing `middle`: after the MLP only its edge in the graph is needed.
        in_place = grad.is_contiguous() and grad.dtype == middle.dtype
        grad = layer.fused_mlp.backward(middle.detach(), grad, ctx.tile, ctx.kept, sums, in_place)
        root = get_gradient_edge(middle) if middle.requires_grad else None
        del middle, hidden
        wanted = [leaf, *attention_parameters] if leaf.requires_grad else attention_parameters
        found = torch.autograd.grad(root, wanted, grad) if root is not None else ()
        sums |= dict(zip(attention_parameters, found[len(found) - ctx.n_attention :], strict=True))
        dx = found[0] if leaf.requires_grad else None  # type: ignore[misc]
        return dx, None, None, None, None, *as_returned(sums, ctx.trained)


class RngAndAutocastState:
    """The RNG state (if random numbers are drawn) and autocast settings of a forward pass, for recomputing it."""

    def __init__(self, device: torch.device, uses_rng: bool = True):
        self.device = device
        self.cpu_rng = torch.get_rng_state() if uses_rng else None
        self.gpu_rng = torch.cuda.get_rng_state(device) if uses_rng and device.type == "cuda" else None
        self.autocast = {
            "device_type": device.type,
            "enabled": torch.is_autocast_enabled(device.type),
            "dtype": torch.get_autocast_dtype(device.type),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }

    @contextmanager
    def restored(self) -> Iterator[None]:
        devices = [self.device] if self.gpu_rng is not None else []
        with torch.random.fork_rng(devices, enabled=self.cpu_rng is not None), torch.autocast(**self.autocast):
            if self.cpu_rng is not None:
                torch.set_rng_state(self.cpu_rng)
            if self.gpu_rng is not None:
                torch.cuda.set_rng_state(self.gpu_rng, self.device)
            yield
