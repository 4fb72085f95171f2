"""How is a frozen linear layer with LoRA computed? y = W x + b + (alpha / rank) B A dropout(x), in few passes.

PEFT clones the layer's output, scales LoRA's and adds the two: three more passes over (tokens, out) in forward and as
many in backward. Here the matrix products add to what is there (BLAS' beta = 1), W is dequantised when needed and
dropped at once, and the dropout mask is drawn again from a number instead of being kept.

Shapes: N tokens of all rows, I and O the layer's inputs and outputs, r the rank of LoRA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

Gradients = dict[nn.Parameter, Tensor]  # summed over tiles of tokens in fp32


class LoRALinear:
    """One linear layer as a pair of functions on plain tensors: `forward`, and `backward` that needs no graph.

    The layer's weight and bias are frozen; LoRA's matrices, if it has them, train. They, the scaling and the dropout
    are read from PEFT's module at every call: whoever loads, rescales or shards an adapter replaces them there.
    """

    def __init__(self, module: nn.Module):
        self.base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        self.lora: Any = module if isinstance(module, LoraLayer) else None
        self._held: Tensor | None = None

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """A (r, I) and B (O, r)."""
        if self.lora is None:
            return None
        name = self.lora.active_adapters[0]
        return self.lora.lora_A[name].weight, self.lora.lora_B[name].weight

    @property
    def scaling(self) -> float:
        return 1.0 if self.lora is None else self.lora.scaling[self.lora.active_adapters[0]]

    @property
    def dropout(self) -> float:
        return 0.0 if self.lora is None else getattr(self.lora.lora_dropout[self.lora.active_adapters[0]], "p", 0.0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the factors that train."""
        return [p for p in self.factors or () if p.requires_grad]

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether this class computes what `module` computes: a frozen linear layer, plain LoRA around it or none."""
        base: Any = module
        if isinstance(module, LoraLayer):
            names = module.active_adapters
            plain = not module.disable_adapters and not module.merged and not module.lora_variant
            if not plain or len(names) != 1 or names[0] not in module.lora_A or module.lora_bias[names[0]]:
                return False
            base = module.get_base_layer()
        return isinstance(base, nn.Linear) and not any(p.requires_grad for p in base.parameters())

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(O, I) in `dtype`, dequantised if the base is in 4 bits."""
        if self._held is not None:
            return self._held
        weight = self.base.weight
        if isinstance(weight, bnb.nn.Params4bit):
            weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return weight.to(dtype)

    @contextmanager
    def holding_weight(self, dtype: torch.dtype) -> Iterator[None]:
        """Dequantise once for all that is computed inside: 90 MiB for a 7B's gate, against 0.06 ms each time."""
        self._held = self.weight(dtype)
        try:
            yield
        finally:
            self._held = None

    def draw(self) -> int | None:
        """What the dropout mask of one call grows from: a number of torch's own CPU generator."""
        return int(torch.randint(2**62, ())) if self.dropout else None

    def forward(self, x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor | None]:
        """(N, I) -> (N, O) and A dropout(x), (N, r), which `backward` wants again."""
        bias = None if self.base.bias is None else self.base.bias.to(x.dtype)
        y = F.linear(x, self.weight(x.dtype), bias)
        low, factors = self.low(x, seed), self.factors
        if low is not None and factors is not None:
            y.addmm_(low, factors[1].to(x.dtype).t(), alpha=self.scaling)
        return y, low

    def low(self, x: Tensor, seed: int | None) -> Tensor | None:
        """A dropout(x), (N, r)."""
        factors = self.factors
        return None if factors is None else _drop(x, self.dropout, seed) @ factors[0].to(x.dtype).t()

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        low: Tensor | None,
        seed: int | None,
        sums: Gradients,
        *,
        need_x: bool = True,
        add_to: Tensor | None = None,
    ) -> Any:
        """dL/dx (N, I) from dL/dy (N, O), added to `add_to` if that is given; None if nobody needs it.

        The gradients of A and B are added to `sums`.
        """
        dx = None
        if need_x:
            weight = self.weight(grad.dtype)
            dx = grad @ weight if add_to is None else add_to.addmm_(grad, weight)
        factors = self.factors
        if factors is None:
            return dx
        (a, b), scaling, dropout = factors, self.scaling, self.dropout
        grad_low = grad @ b.to(grad.dtype)
        _add(sums, b, grad.t(), low, scaling)
        _add(sums, a, grad_low.t(), _drop(x, dropout, seed), scaling)
        if dx is None:
            return None
        if dropout:
            return dx.add_(_drop(grad_low @ a.to(grad.dtype), dropout, seed), alpha=scaling)
        return dx.addmm_(grad_low, a.to(grad.dtype), alpha=scaling)


def _add(sums: Gradients, parameter: nn.Parameter, left: Tensor, right: Any, scale: float) -> None:
    """sums[parameter] += scale * left @ right, in fp32 as soon as there is more than one tile to sum."""
    if not parameter.requires_grad:
        return
    value = torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
    sums[parameter] = sums[parameter].float().add_(value) if parameter in sums else value


def in_order(sums: Gradients, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The gradients as an autograd function returns them."""
    return [sums[parameter].to(parameter.dtype) for parameter in parameters]


def _drop(x: Tensor, probability: float, seed: int | None) -> Tensor:
    """Dropout whose mask depends on `seed` and the shape alone: linear in x, so that it is its own backward too."""
    if seed is None or not probability:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - probability, generator=generator)
    return (x * keep).div_(1 - probability)


class _LoRALinearFunction(torch.autograd.Function):
    """`LoRALinear` as a function that autograd knows, for layers that Hugging Face's code calls."""

    @staticmethod
    def forward(ctx, x: Tensor, projection: LoRALinear, *trained: nn.Parameter) -> Tensor:
        ctx.seed, ctx.projection, ctx.shape, ctx.trained = projection.draw(), projection, x.shape, trained
        flat = x.reshape(-1, x.shape[-1])
        y, low = projection.forward(flat, ctx.seed)
        ctx.save_for_backward(x, low)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, low = ctx.saved_tensors
        sums: Gradients = {}
        grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = ctx.projection.backward(grad, x, low, ctx.seed, sums, need_x=ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, *in_order(sums, ctx.trained)


def compute_in(x: Tensor) -> Tensor:
    """`x` in the type that autocast computes in, where autocast is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class FusedLoRALayer(nn.Module):
    """Mixed into the class of a PEFT layer: training goes through `_LoRALinearFunction`, all else as PEFT does it."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        # without gradients too: a layer that is computed again must draw the same dropout mask both times
        trains = self.training and not self.disable_adapters and not self.merged
        if not trains or args or kwargs:
            return super().forward(x, *args, **kwargs)
        return _LoRALinearFunction.apply(compute_in(x), self.projection, *self.projection.parameters)


def fuse_lora(model: nn.Module) -> None:
    """Let every LoRA layer of `model` that `LoRALinear` can compute do so while it trains."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and LoRALinear.fits(layer):
            layer.__class__ = type(f"Fused{type(layer).__name__}", (FusedLoRALayer, type(layer)), {})
            layer.projection = LoRALinear(layer)
