"""How is a frozen linear layer with LoRA computed? y = W x + b + (alpha / rank) B A dropout(x), in few passes.

PEFT computes the layer's output, scales LoRA's, and adds the two: three more passes over (tokens, out) in the forward
pass and as many in the backward pass. Here matrix products accumulate in place (BLAS with beta = 1), W is dequantized
when needed and freed right after, and the dropout mask is regenerated from a seed instead of being saved. The products
with W alone may be computed in FP8 (component/float8/product.py); LoRA's see unquantized activations and gradients.

Shapes: N tokens of all rows, I and O the layer's input and output features, r the LoRA rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from component.float8.product import Float8Matrix, fits, multiply, quantize, quantize_weight

Gradients = dict[nn.Parameter, Tensor]  # summed over tiles of tokens in fp32


class LoRALinear:
    """One linear layer as plain functions on tensors: `forward`, and a `backward` that needs no autograd graph.

    The layer's weight and bias are frozen; LoRA's matrices, if any, are trained. LoRA's matrices, scaling and dropout
    are read from PEFT's module at every call, since loading, rescaling or sharding an adapter replaces them there.
    """

    def __init__(self, module: nn.Module):
        self.base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        self.lora: Any = module if isinstance(module, LoraLayer) else None
        if self.lora is not None:  # PEFT's own dicts: a module looks up its attributes slowly, at 80 calls a layer
            self._matrices = self.lora.lora_A._modules, self.lora.lora_B._modules
            self._scalings, self._dropouts = self.lora.scaling, self.lora.lora_dropout._modules
        # whether the product with the frozen weight, and its gradient of the input, are computed in FP8
        self.float8_forward = self.float8_backward = False
        self.calls: Any = None  # component.memory.shared_input.SharedCalls, with layers that have the same input
        self._held: dict[Any, Any] | None = None

    @property
    def _active(self) -> str:
        name = self.lora.active_adapter
        return name if isinstance(name, str) else name[0]

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """A (r, I) and B (O, r)."""
        if self.lora is None:
            return None
        name, (of_a, of_b) = self._active, self._matrices
        return of_a[name].weight, of_b[name].weight

    @property
    def scaling(self) -> float:
        return 1.0 if self.lora is None else self._scalings[self._active]

    @property
    def dropout(self) -> float:
        return 0.0 if self.lora is None else getattr(self._dropouts[self._active], "p", 0.0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones."""
        return [p for p in self.factors or () if p.requires_grad]

    @staticmethod
    def supports(module: nn.Module) -> bool:
        """Whether this class can compute `module`: a frozen linear layer, with plain LoRA or without."""
        base: Any = module
        if isinstance(module, LoraLayer):
            names = module.active_adapters
            is_plain = not module.disable_adapters and not module.merged and not module.lora_variant
            if not is_plain or len(names) != 1 or names[0] not in module.lora_A or module.lora_bias[names[0]]:
                return False
            base = module.get_base_layer()
        return isinstance(base, nn.Linear) and not any(p.requires_grad for p in base.parameters())

    def use_float8(self, *, forward: bool = True) -> None:
        """From now on, compute gradients of the input in FP8, and with `forward` outputs, if the shape allows it."""
        self.float8_backward = fits(self.base)
        self.float8_forward = forward and self.float8_backward

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(O, I) in `dtype`, dequantized if the base is in 4 bits."""
        return self.once(dtype, lambda: self._dequantized().to(dtype))

    def _dequantized(self) -> Tensor:
        weight = self.base.weight
        if isinstance(weight, bnb.nn.Params4bit):
            return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return weight

    def float8_weight(self, *, transposed: bool) -> Float8Matrix:
        """(O, I), or (I, O) for the gradient of the input."""
        name = "transposed" if transposed else "float8"
        return self.once(name, lambda: quantize_weight(self.base.weight, transposed=transposed))

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        if self._held is None:
            return make()
        if name not in self._held:
            self._held[name] = make()
        return self._held[name]

    def cast(self, factor: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """A or B in `dtype`."""
        return factor if factor.dtype == dtype else self.once((id(factor), dtype), lambda: factor.to(dtype))

    @contextmanager
    def holding_weight(self) -> Iterator[None]:
        """Dequantize and cast once for all calls inside: holds 90 MiB for a 7B's gate, and saves 0.06 ms per call."""
        self._held = {}
        try:
            yield
        finally:
            self._held = None

    def draw_seed(self) -> int | None:
        """The seed of one call's dropout mask, from torch's CPU generator; None without dropout."""
        return int(torch.randint(2**62, ())) if self.dropout else None

    def quantized(self, x: Tensor) -> Float8Matrix | None:
        """`x` (N, I) for `forward`, to be shared by layers with the same input; None unless in FP8."""
        return quantize(x) if self.float8_forward else None

    def forward(
        self, x: Tensor, seed: int | None = None, quantized: Float8Matrix | None = None, low: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(N, I) -> (N, O), and A dropout(x) (N, r) for `backward`.

        Args:
            quantized, low: x in FP8 and A dropout(x), where they are there already.
        """
        bias = None if self.base.bias is None else self.base.bias.to(x.dtype)
        if self.float8_forward:
            y = multiply(quantized or quantize(x), self.float8_weight(transposed=False), x.dtype, bias)
        else:
            y = F.linear(x, self.weight(x.dtype), bias)
        factors = self.factors
        if factors is None:
            return y, None
        low = _drop(x, self.dropout, seed) @ self.cast(factors[0], x.dtype).t() if low is None else low
        return y.addmm_(low, self.cast(factors[1], x.dtype).t(), alpha=self.scaling), low

    def low(self, x: Tensor, seed: int | None) -> Tensor | None:
        """A dropout(x), (N, r)."""
        factors = self.factors
        return None if factors is None else _drop(x, self.dropout, seed) @ self.cast(factors[0], x.dtype).t()

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None,
        low: Tensor | None,
        seed: int | None,
        sums: Gradients,
        *,
        need_x: bool = True,
        add_to: Tensor | None = None,
    ) -> Any:
        """dL/dx (N, I) from dL/dy (N, O), accumulated in `add_to` if given; None unless `need_x`.

        The gradients of A and B are added to `sums`; without LoRA, `x` is not needed.
        """
        dx = self.input_gradient(grad, add_to) if need_x else None
        factors = self.factors
        if factors is None or x is None:
            return dx
        (a, b), scaling, dropout = factors, self.scaling, self.dropout
        a_cast, grad_low = self.cast(a, grad.dtype), grad @ self.cast(b, grad.dtype)
        accumulate(sums, b, grad.t(), low, scaling)
        accumulate(sums, a, grad_low.t(), _drop(x, dropout, seed), scaling)
        if dx is None:
            return None
        if dropout:
            return dx.add_(_drop(grad_low @ a_cast, dropout, seed), alpha=scaling)
        return dx.addmm_(grad_low, a_cast, alpha=scaling)

    def input_gradient(self, grad: Tensor, add_to: Tensor | None) -> Tensor:
        """dL/dx (N, I) through the frozen weight alone, from dL/dy (N, O), accumulated in `add_to` if given."""
        if self.float8_backward:
            dx = multiply(quantize(grad), self.float8_weight(transposed=True), grad.dtype)
            return dx if add_to is None else add_to.add_(dx)
        weight = self.weight(grad.dtype)
        return grad @ weight if add_to is None else add_to.addmm_(grad, weight)


def accumulate(sums: Gradients, parameter: nn.Parameter, left: Tensor, right: Any, scale: float) -> None:
    """sums[parameter] += scale * left @ right."""
    if parameter.requires_grad:
        add_gradient(sums, parameter, torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale))


def add_gradient(sums: Gradients, parameter: nn.Parameter, value: Tensor) -> None:
    """sums[parameter] += value, if it is trained; in fp32 from the second tile on."""
    if parameter.requires_grad:
        sums[parameter] = sums[parameter].float().add_(value) if parameter in sums else value


def as_returned(sums: Gradients, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The gradients in the order and dtypes of `parameters`, as an autograd function returns them."""
    return [sums[parameter].to(parameter.dtype) for parameter in parameters]


def _drop(x: Tensor, probability: float, seed: int | None) -> Tensor:
    """Dropout with a mask determined by `seed` and the shape; linear in x, so it is its own backward as well."""
    if seed is None or not probability:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - probability, generator=generator)
    return (x * keep).div_(1 - probability)


class _LoRALinearFunction(torch.autograd.Function):
    """`LoRALinear` as an autograd function, for layers called by Hugging Face's code."""

    @staticmethod
    def forward(ctx, x: Tensor, projection: LoRALinear, *trained: nn.Parameter) -> Tensor:
        ctx.seed, ctx.projection, ctx.shape, ctx.trained = projection.draw_seed(), projection, x.shape, trained
        flat = x.reshape(-1, x.shape[-1])
        y, low = projection.forward(flat, ctx.seed)
        ctx.save_for_backward(None if projection.factors is None else x, low)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, low = ctx.saved_tensors
        sums: Gradients = {}
        grad, x = grad.reshape(-1, grad.shape[-1]), None if x is None else x.reshape(-1, x.shape[-1])
        dx = ctx.projection.backward(grad, x, low, ctx.seed, sums, need_x=ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, *as_returned(sums, ctx.trained)


def _call(projection: LoRALinear, x: Tensor) -> Tensor:
    if projection.calls is not None:
        return projection.calls.output(projection, x)
    return _LoRALinearFunction.apply(to_autocast_dtype(x), projection, *projection.parameters)


def to_autocast_dtype(x: Tensor) -> Tensor:
    """`x` in autocast's dtype if autocast is enabled, else unchanged."""
    device_type = x.device.type
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x


class FusedLoRALayer(nn.Module):
    """Mixed into the class of a PEFT layer: `_LoRALinearFunction` in training, PEFT's own forward otherwise."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        # also under no_grad: the first pass of a recomputed layer must draw the same dropout mask as the second
        is_plain = not self.disable_adapters and not self.merged and len(self.active_adapters) == 1
        trains = self.training and is_plain
        if not trains or args or kwargs:
            return super().forward(x, *args, **kwargs)
        return _call(self.projection, x)


class FusedFrozenLayer(nn.Module):
    """The same for a frozen linear layer without LoRA."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return _call(self.projection, x)


def fuse_lora(model: nn.Module) -> None:
    """Mix `FusedLoRALayer` into every LoRA layer of `model` that `LoRALinear` supports."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and LoRALinear.supports(layer):
            _fuse(layer, FusedLoRALayer)


def _fuse(layer: nn.Module, mixin: type[nn.Module]) -> None:
    layer.__class__ = type(f"Fused{type(layer).__name__}", (mixin, type(layer)), {})
    layer.projection = LoRALinear(layer)


def use_float8(decoder: nn.Module, *, forward: bool = True) -> None:
    """Compute all products with frozen weights in `decoder`, whose LoRA layers are fused, in FP8.

    Args:
        forward: of the forward pass too, not only gradients of activations.
    """
    of_lora = {id(part) for layer in decoder.modules() if isinstance(layer, LoraLayer) for part in layer.modules()}
    for layer in decoder.modules():
        if isinstance(layer, nn.Linear) and id(layer) not in of_lora and LoRALinear.supports(layer):
            _fuse(layer, FusedFrozenLayer)
        if isinstance(projection := getattr(layer, "projection", None), LoRALinear):
            projection.use_float8(forward=forward)
