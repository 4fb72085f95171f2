"""What does a decoder layer keep for its backward pass?

Three levels, each a row of the memory plan:

    nothing      the layer's input, on the GPU or the host; everything else is computed again
    attention    what attention needs; the MLP is computed again from its input
    everything   what attention needs, and the MLP's gate and up; only norms and activations are computed again

Whatever the level, the MLP runs in tiles of tokens, its last product is never computed twice, because nobody needs it,
and the gradient of each weight leaves the layer once per backward pass, as the hooks of ZeRO and DDP expect.

Shapes: B batch, T tokens, N = B T, H hidden size.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from component.attention.shift_short import SavedAttention
from component.memory.linear import Gradients, LoRALinear, compute_in, in_order
from component.memory.offload import ActivationOffloader

LEVELS = ("nothing", "attention", "everything")
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


class LeanLayer(nn.Module):
    """Mixed into the class of a decoder layer: training as its `level` says, all else as Hugging Face does it."""

    level: str = "everything"
    tile: int = 0  # tokens per MLP tile; 0: one tile
    keeps_attention_output: bool = False  # of a layer that keeps nothing else: attention's kernel runs once
    stack: ActivationOffloader | None = None  # where the input of a layer that keeps nothing waits; None: on the GPU

    def prepare(self) -> None:
        """Look up once what every forward pass needs; the adapter must be in place."""
        self.second_half = FusedMLP(self)
        dropouts = [m.p for m in self.modules() if isinstance(m, nn.Dropout)]
        self.draws = any(dropouts) or bool(getattr(self.self_attn, "attention_dropout", 0.0))

    def forward(self, hidden_states: Tensor, **call) -> Tensor:
        if not self.training or not torch.is_grad_enabled():
            return super().forward(hidden_states, **call)
        mlp, tile = self.second_half, self.tile or hidden_states.shape[:-1].numel()
        if self.level == "nothing":
            call |= {"past_key_values": None, "use_cache": False}  # computing again would add to a cache again
            first = [*_trained(self.input_layernorm), *_trained(self.self_attn)]
            return _RecomputedLayer.apply(hidden_states, self, call, tile, len(first), *first, *mlp.parameters)
        hidden = self.attend(hidden_states, call)
        return _MLP.apply(hidden, mlp, tile, self.level == "everything", *mlp.parameters)

    def attend(self, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        """The first half of the layer, (B, T, H): x + attention(norm(x))."""
        return hidden + self.self_attn(self.input_layernorm(hidden), **call)[0]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def lean_layers(model: nn.Module) -> list[LeanLayer]:
    """Mix `LeanLayer` into the decoder layers of `model`; an empty list if it has others than those of `LAYERS`."""
    layers = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    if not layers or not all(_fits(layer) for layer in layers):
        return []
    for layer in layers:
        layer.__class__ = type(f"Lean{type(layer).__name__}", (LeanLayer, type(layer)), {})
        layer.prepare()
    return layers


def _fits(layer: nn.Module) -> bool:
    if type(layer).__name__ not in LAYERS:
        return False
    return all(LoRALinear.fits(getattr(layer.mlp, name)) for name in ("gate_proj", "up_proj", "down_proj"))


class FusedMLP:
    """The second half of a layer, h + down(act(gate(n)) * up(n)) with n = norm(h), forward and backward by tiles."""

    def __init__(self, layer: nn.Module):
        mlp = layer.mlp
        self.norm = layer.post_attention_layernorm
        self.activate = lambda gate, up: mlp.act_fn(gate) * up  # Liger's one kernel takes its place where it runs
        self.gate, self.up, self.down = (LoRALinear(p) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that trains here."""
        return [*_trained(self.norm), *self.gate.parameters, *self.up.parameters, *self.down.parameters]

    def forward(self, hidden: Tensor, tile: int, keep: bool) -> tuple[Tensor, list[dict]]:
        """(B, T, H) -> the same shape, and for each tile what `backward` wants to know."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        out, kept, tiles = torch.empty_like(flat), [], _tiles(len(flat), tile)
        with self._holding_weights(compute_in(flat[:0]).dtype, times=len(tiles)):
            for start, end in tiles:
                saved: dict[str, Any] = {
                    "seeds": {name: getattr(self, name).draw() for name in ("gate", "up", "down")}
                }
                normed = compute_in(self.norm(flat[start:end]))
                saved["dtype"] = normed.dtype  # autocast is off while going backward
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
        """dL/dh (B, T, H) from dL/dy, where that was if `in_place`; the weights' gradients are added to `sums`."""
        flat, grad_flat = hidden.reshape(-1, hidden.shape[-1]), grad.reshape(-1, grad.shape[-1])
        out, tiles = grad_flat if in_place else torch.empty_like(flat), _tiles(len(flat), tile)
        with self._holding_weights(kept[0]["dtype"], times=len(tiles) if "gate" in kept[0] else 2 * len(tiles)):
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
        plain = active.detach()
        low = saved["low"] if "low" in saved else self.down.low(plain, seeds["down"])
        grad_active = self.down.backward(grad.to(plain.dtype), plain, low, seeds["down"], sums)
        grad_gate, grad_up = torch.autograd.grad(active, leaves, grad_active)
        del active, plain, grad_active
        grad_normed = self.gate.backward(grad_gate, normed, gate[1], seeds["gate"], sums)
        self.up.backward(grad_up, normed, up[1], seeds["up"], sums, add_to=grad_normed)
        of_norm = _trained(self.norm)
        through_norm, *norm_gradients = torch.autograd.grad(
            normed_graph, [leaf, *of_norm], grad_normed.to(normed_graph.dtype)
        )
        for parameter, gradient in zip(of_norm, norm_gradients, strict=True):
            sums[parameter] = sums[parameter] + gradient.float() if parameter in sums else gradient.float()
        torch.add(grad, through_norm, out=out)

    def _gate_and_up(self, normed: Tensor, saved: dict) -> tuple[tuple, tuple]:
        seeds = saved["seeds"]
        return self.gate.forward(normed, seeds["gate"]), self.up.forward(normed, seeds["up"])

    @contextmanager
    def _holding_weights(self, dtype: torch.dtype, times: int) -> Iterator[None]:
        with ExitStack() as stack:
            for projection in (self.gate, self.up, self.down) if times > 1 else ():
                stack.enter_context(projection.holding_weight(dtype))
            yield


def _tiles(tokens: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class _MLP(torch.autograd.Function):
    """`FusedMLP` for a layer that keeps its attention: h is kept; gate and up are too, or are computed again."""

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
        return dx, None, None, None, *in_order(sums, ctx.trained)


class _RecomputedLayer(torch.autograd.Function):
    """A whole layer that keeps its input alone, here or on the host, and attention's output if asked."""

    @staticmethod
    def forward(ctx, hidden: Tensor, layer: LeanLayer, call: dict, tile: int, first: int, *trained: nn.Parameter):
        # `first` of `trained` belong to the layer's first half
        ctx.layer, ctx.call, ctx.tile, ctx.first, ctx.trained = layer, call, tile, trained[:first], trained
        ctx.ambience = RngAndAutocastState(hidden.device, layer.draws)
        ctx.memo = SavedAttention() if layer.keeps_attention_output else None
        if ctx.memo is not None:
            ctx.call = call = {**call, "saved_attention": ctx.memo}
        middle = layer.attend(hidden, call)
        out, ctx.kept = layer.second_half.forward(middle, tile, keep=False)
        waiting = [hidden] + ([ctx.memo.out] if ctx.memo is not None and ctx.memo.out is not None else [])
        if layer.stack is None:
            ctx.take = lambda: waiting
        else:
            ctx.take = layer.stack.put(waiting)
            if len(waiting) == 2:
                ctx.memo.out = None
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (hidden, *kept), ctx.take = ctx.take(), None
        if kept:
            ctx.memo.out = kept.pop()
        layer, first = ctx.layer, ctx.first
        sums: Gradients = {}
        with ctx.ambience.again(), torch.enable_grad():
            leaf = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
            middle = layer.attend(leaf, ctx.call)
        # The layer above made this gradient and nobody else reads it. One tensor less at the moment of most memory,
        # as is `middle`: only its place in the graph is needed once the MLP is through.
        in_place = grad.is_contiguous() and grad.dtype == middle.dtype
        grad = layer.second_half.backward(middle.detach(), grad, ctx.tile, ctx.kept, sums, in_place)
        root = get_gradient_edge(middle) if middle.requires_grad else None
        del middle, hidden
        wanted = [leaf, *first] if leaf.requires_grad else first
        found = torch.autograd.grad(root, wanted, grad) if root is not None else ()
        if ctx.memo is not None:
            ctx.memo.out = None  # `ctx` lives until the whole backward pass is over
        sums |= dict(zip(first, found[len(found) - len(first) :], strict=True))
        dx = found[0] if leaf.requires_grad else None  # type: ignore[misc]
        return dx, None, None, None, None, *in_order(sums, ctx.trained)


class RngAndAutocastState:
    """Random numbers, if any are drawn, and autocast as they were in the forward pass, for computing it again."""

    def __init__(self, device: torch.device, draws: bool = True):
        self.device = device
        self.random = torch.get_rng_state() if draws else None
        self.random_on_device = torch.cuda.get_rng_state(device) if draws and device.type == "cuda" else None
        self.autocast = {
            "device_type": device.type,
            "enabled": torch.is_autocast_enabled(device.type),
            "dtype": torch.get_autocast_dtype(device.type),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }

    @contextmanager
    def again(self) -> Iterator[None]:
        devices = [self.device] if self.random_on_device is not None else []
        with torch.random.fork_rng(devices, enabled=self.random is not None), torch.autocast(**self.autocast):
            if self.random is not None:
                torch.set_rng_state(self.random)
            if self.random_on_device is not None:
                torch.cuda.set_rng_state(self.random_on_device, self.device)
            yield
