"""Does a module of a merged model do what PEFT's module with the adapter unmerged does?

Weights are read from the files when a pair of modules is called, and forgotten afterwards. Linear layers and norms get
the same random inputs beside the hidden states of their models, so that a difference is traced to its tensor: if x is
standard normal, E |D x|^2 is the squared Frobenius norm of D. Of embeddings all rows are compared.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from component.merge.write import nf4_round_trip
from component.storage.tensor_reader import TensorRef

PROBES = 16  # random inputs of each linear layer and norm
PART = 2**22  # elements of a weight in memory at a time; glibc returns larger blocks to the system after each use
ARITHMETIC = 1e-4  # relative error of fp32 sums, with a wide margin


@dataclass
class Difference:
    """|theirs - ours| / |ours| of one tensor, or of what it does to one input."""

    kind: str
    bound: float  # of the relative difference
    slack: float = 0.0  # of the absolute difference: numbers too small for the exponent of the dtype
    gap: float = 0.0  # squared norm of the difference, summed over the parts of the tensor
    norm: float = 0.0  # squared

    def add(self, ours: Tensor, theirs: Tensor, slack: float = 0.0) -> None:
        self.gap += float(torch.linalg.vector_norm(theirs - ours)) ** 2
        self.norm += float(torch.linalg.vector_norm(ours)) ** 2
        self.slack = math.hypot(self.slack, slack * math.sqrt(ours.numel()))

    @property
    def relative(self) -> float:
        if self.gap == 0:
            return 0.0
        return math.sqrt(self.gap / self.norm) if math.isfinite(self.gap) and self.norm else math.inf

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains it; NaN is not rounding."""
        return math.sqrt(self.gap) <= self.bound * math.sqrt(self.norm) + self.slack


@dataclass
class Differences:
    """Of all tensors by name, in the order of the forward pass."""

    of: dict[str, Difference] = field(default_factory=dict)

    def of_tensor(self, stored: TensorRef, kind: str) -> Difference:
        bound = torch.finfo(stored.dtype).eps / 2 + ARITHMETIC
        return self.of.setdefault(stored.name, Difference(kind, bound))

    def of_output(self, name: str, kind: str, bound: float) -> Difference:
        return self.of.setdefault(name, Difference(kind, bound))


@dataclass
class Source:
    """Where a weight is stored, and whether it is used as quantized to NF4."""

    stored: TensorRef
    quantized_from: torch.dtype | None = None

    def read(self, axis: int | None, rows: slice | None) -> Tensor:
        """The weight, or those `rows` of it along `axis`."""
        if rows is None or axis is None:
            values = self.stored.read()
            return values if self.quantized_from is None else nf4_round_trip(values.to(self.quantized_from))
        return self.stored.read_rows(rows.start, rows.stop) if axis == 0 else self.stored.read()[:, rows]


@dataclass
class Side:
    """A module of one of the two models; it has no weights of its own."""

    module: nn.Module
    sources: dict[str, Source]

    def __call__(self, inputs: Tensor, rows: slice | None) -> Tensor:
        """Its outputs, in fp32; of a linear layer `rows` of them, of an embedding those of the tokens in `rows`."""
        weights = {
            name: source.read(_axis(name), rows).to(inputs.device, torch.float32)
            for name, source in self.sources.items()
        }
        return functional_call(self.module, weights, (inputs,))


def _axis(name: str) -> int | None:
    """The axis of a module's parameter along which the rows of its weight lie."""
    if "lora_A." in name or "lora_embedding_B." in name:
        return None
    return 1 if "lora_embedding_A." in name else 0


@dataclass
class Pair:
    """The same module of both models."""

    kind: str
    adapted: Side
    merged: Side
    found: Differences

    @property
    def _weight(self) -> TensorRef:
        return self.merged.sources["weight"].stored

    def _parts(self) -> Iterator[slice | None]:
        """The rows of the weight, a part at a time; None for all at once, where a part would need the others."""
        stored = self._weight
        rows = max(1, PART // math.prod(stored.shape[1:]))
        is_whole = any(source.quantized_from for source in self.adapted.sources.values())
        is_whole |= any("lora_magnitude_vector" in name for name in self.adapted.sources) and self.is_embedding
        if is_whole or len(stored.shape) == 1 or rows >= stored.shape[0]:
            yield None
            return
        for start in range(0, stored.shape[0], rows):
            yield slice(start, min(start + rows, stored.shape[0]))

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.merged.module, nn.Embedding)

    def transform(self, hidden: Tensor) -> Tensor:
        """Outputs of a linear layer or norm for the two halves of `hidden` (2B, ..., features)."""
        stored, bias = self._weight, self.merged.sources.get("bias")
        features = stored.shape[-1]
        probes = _probes(features, is_centered=bias is not None).to(hidden.device)
        outputs = hidden.new_empty((*hidden.shape[:-1], stored.shape[0]))
        tiny = _rounding_of_tiny(stored.dtype)
        for rows in self._parts():
            seen = []
            for side, values, into in zip((self.adapted, self.merged), hidden.chunk(2), outputs.chunk(2), strict=True):
                flat = torch.cat([values.reshape(-1, features), probes])
                result = side(flat, rows)
                into[..., rows or slice(None)] = result[: -len(probes)].reshape(*values.shape[:-1], -1)
                seen.append(result[-len(probes) :])
            ours, theirs = seen
            if bias is not None:  # the output for an input of zeros
                self.found.of_tensor(bias.stored, f"{self.kind} bias").add(ours[0], theirs[0], tiny)
                ours, theirs = ours[1:] - ours[0], theirs[1:] - theirs[0]
            fan_in = math.sqrt(features) if len(stored.shape) > 1 else 1.0
            self.found.of_tensor(stored, self.kind).add(ours, theirs, tiny * fan_in)
        return outputs

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of the two halves of `ids` (2B, T); the rows of all other tokens are compared too."""
        stored = self._weight
        outputs = torch.empty((*ids.shape, stored.shape[1]), device=ids.device)
        for rows in self._parts():
            start, stop, _ = (rows or slice(None)).indices(stored.shape[0])
            tokens = torch.arange(stop - start, device=ids.device)
            ours, theirs = self.adapted(tokens, rows), self.merged(tokens, rows)
            self.found.of_tensor(stored, self.kind).add(ours, theirs, _rounding_of_tiny(stored.dtype))
            for values, numbers, into in zip((ours, theirs), ids.chunk(2), outputs.chunk(2), strict=True):
                is_inside = (numbers >= start) & (numbers < stop)
                into[is_inside] = values[numbers[is_inside] - start]
        return outputs


def _probes(features: int, *, is_centered: bool) -> Tensor:
    """(PROBES, features) standard normal inputs; if `is_centered`, after an input of zeros."""
    values = torch.randn(PROBES + is_centered, features, generator=torch.Generator().manual_seed(features))
    if is_centered:
        values[0] = 0
    return values


def _rounding_of_tiny(dtype: torch.dtype) -> float:
    """Largest error of rounding a number that is too small for the exponent of `dtype`."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
