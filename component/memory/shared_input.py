"""How are linear layers with the same input computed? Together, so that LoRA reads and writes it once for all of them.

Queries, keys and values read the same hidden states, and so do an MLP's gate and up projections. A product with a thin
matrix takes as long as its large factor takes to be read, so one product with the A of all layers, side by side, takes
a third of the time of three; the same holds for the gradients of A and of the input. In FP8 the input is quantized
once. The gradients of the input add up in place, where autograd would add whole tensors.

Shapes: N tokens of all rows, I and O a layer's input and output features, R the sum of the layers' LoRA ranks.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from component.memory.linear import Gradients, LoRALinear, accumulate, add_gradient, as_returned, to_autocast_dtype

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")


class SharedInputLinears:
    """Linear layers that read the same input, as plain functions on tensors; see `LoRALinear`."""

    def __init__(self, parts: Sequence[LoRALinear]):
        self.parts = list(parts)

    @property
    def factors(self) -> list[tuple[nn.Parameter, nn.Parameter]] | None:
        """(A, B) of each layer; None where LoRA's products are not computed together.

        That is so without LoRA, and with dropout, which masks each layer's input anew.
        """
        found = [part.factors for part in self.parts if not part.dropout]
        factors = [pair for pair in found if pair is not None]
        return factors if len(factors) == len(self.parts) else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones."""
        return [parameter for part in self.parts for parameter in part.parameters]

    def draw_seeds(self) -> list[int | None]:
        return [part.draw_seed() for part in self.parts]

    def forward(self, x: Tensor, seeds: Sequence[int | None]) -> list[tuple[Tensor, Tensor | None]]:
        """(N, I) -> for each layer its output (N, O), and A dropout(x) (N, r) for `backward`."""
        quantized = next((part.quantized(x) for part in self.parts if part.float8_forward), None)
        lows: Sequence[Tensor | None] = [None] * len(self.parts)
        if factors := self.factors:
            lows = (x @ self._side_by_side(factors, x.dtype).t()).split([len(a) for a, _ in factors], 1)
        calls = zip(self.parts, seeds, lows, strict=True)
        return [part.forward(x, seed, quantized, low) for part, seed, low in calls]

    def backward(
        self,
        grads: Sequence[Tensor],
        x: Tensor | None,
        lows: Sequence[Tensor | None],
        seeds: Sequence[int | None],
        sums: Gradients,
        *,
        need_x: bool = True,
    ) -> Any:
        """dL/dx (N, I) from the layers' dL/dy (N, O); None unless `need_x`. See `LoRALinear.backward`."""
        dx, factors = None, self.factors
        if x is None or factors is None:
            for part, grad, low, seed in zip(self.parts, grads, lows, seeds, strict=True):
                dx = part.backward(grad, x, low, seed, sums, need_x=need_x, add_to=dx)
            return dx
        grad_lows = []
        for part, (_, b), grad, low in zip(self.parts, factors, grads, lows, strict=True):
            scaling = part.scaling
            cast = part.cast(b, grad.dtype)
            grad_lows.append(torch.addmm(grad.new_empty(()), grad, cast, beta=0, alpha=scaling))
            accumulate(sums, b, grad.t(), low, scaling)
        grad_low = torch.cat(grad_lows, 1)  # (N, R)
        of_a = [a for a, _ in factors]
        if any(a.requires_grad for a in of_a):
            for a, value in zip(of_a, (grad_low.t() @ x).split([len(a) for a in of_a]), strict=True):
                add_gradient(sums, a, value)
        if not need_x:
            return None
        for part, grad in zip(self.parts, grads, strict=True):
            dx = part.input_gradient(grad, dx)
        assert dx is not None
        return dx.addmm_(grad_low, self._side_by_side(factors, grad_low.dtype))

    def _side_by_side(self, factors: list[tuple[nn.Parameter, nn.Parameter]], dtype: torch.dtype) -> Tensor:
        """(R, I): the A of all layers."""
        return self.parts[0].once(("side by side", dtype), lambda: torch.cat([a for a, _ in factors]).to(dtype))


class _SharedInputFunction(torch.autograd.Function):
    """`SharedInputLinears` as an autograd function: an output for each layer."""

    @staticmethod
    def forward(ctx, x: Tensor, linears: SharedInputLinears, *trained: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.seeds, ctx.linears, ctx.shape, ctx.trained = linears.draw_seeds(), linears, x.shape, trained
        found = linears.forward(x.reshape(-1, x.shape[-1]), ctx.seeds)
        has_lora = any(part.factors is not None for part in linears.parts)
        ctx.save_for_backward(x if has_lora else None, *(low for _, low in found))
        return tuple(y.view(*x.shape[:-1], -1) for y, _ in found)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *lows = ctx.saved_tensors
        sums: Gradients = {}
        flat = None if x is None else x.reshape(-1, x.shape[-1])
        of_rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dx = ctx.linears.backward(of_rows, flat, lows, ctx.seeds, sums, need_x=ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, *as_returned(sums, ctx.trained)


class SharedCalls:
    """Computes all layers with one input at the first one's call; the others take theirs when they are called."""

    def __init__(self, parts: Sequence[LoRALinear]):
        self.linears = SharedInputLinears(parts)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:  # a copied model computes its own outputs
        return {"linears": self.linears, "_input": None, "_state": None, "_outputs": {}}

    def forget(self) -> None:
        self._input: weakref.ref | None = None
        self._state: tuple | None = None
        self._outputs: dict[int, Tensor] = {}  # by id of the layer

    def output(self, part: LoRALinear, x: Tensor) -> Tensor:
        """(..., O) of `part`. Another tensor than in the last call, or changed since, is computed anew."""
        state = _state_of(x)
        is_known = self._input is not None and self._input() is x and self._state == state
        if not is_known or id(part) not in self._outputs:
            self.forget()
            found = _SharedInputFunction.apply(to_autocast_dtype(x), self.linears, *self.linears.parameters)
            self._input, self._state = weakref.ref(x), state
            self._outputs = {id(part): y for part, y in zip(self.linears.parts, found, strict=True)}
        return self._outputs.pop(id(part))


def _state_of(x: Tensor) -> tuple:
    """Besides `x` itself, what its outputs depend on: how often it was changed, whether gradients follow, autocast."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return None if x.is_inference() else x._version, torch.is_grad_enabled(), autocast


def join_attention_inputs(model: nn.Module) -> None:
    """Compute together the fused queries, keys and values of each attention layer of `model`."""
    for module in model.modules():
        found = [getattr(getattr(module, name, None), "projection", None) for name in ATTENTION_INPUTS]
        parts = [part for part in found if isinstance(part, LoRALinear)]
        if len(parts) == len(found):
            calls = SharedCalls(parts)
            for part in parts:
                part.calls = calls
