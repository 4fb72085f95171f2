"""How are a layer's keys and values kept in 8, 4 or 2 bits? In blocks of tokens, each quantized once and never again.

A block is quantized when its last token arrives; the tokens after the last full block stay as computed. Keys share a
scale and a zero point per channel and block, values per token and group of channels (KIVI, arXiv 2402.02750, section
3.2: some channels of keys are far larger than the others in every token). transformers' own QuantizedLayer dequantizes
and quantizes again everything that it holds every 128 tokens: errors add up, and reading a text takes quadratic time.

Shapes: B rows, K key/value heads, T tokens, D head size; G = B K, n blocks, P values per byte.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

BLOCK = 64  # tokens that are quantized together
SEGMENT = 128  # blocks per allocation: 8192 tokens; tensors of one size leave no holes in PyTorch's allocator
FIRST = 8  # blocks of the first allocation; a short text's double from there
GROUP = 64  # at most so many channels of a value share a scale
FP8 = torch.float8_e4m3fn


class Format(NamedTuple):
    """How numbers are stored: `bits` each, as integers with scale and zero point, or as fp8 with a scale."""

    name: str
    bits: int

    @property
    def has_zero(self) -> bool:
        return self.name != "fp8"

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    def groups(self, head_size: int, is_key: bool) -> tuple[int, int]:
        """(tokens, channels) of a block that share a scale."""
        if not self.has_zero:
            return BLOCK, head_size  # a floating-point number has its own exponent
        return (BLOCK, 1) if is_key else (1, math.gcd(head_size, GROUP))


FORMATS = {name: Format(name, bits) for name, bits in (("int8", 8), ("fp8", 8), ("int4", 4), ("int2", 2))}


def capacities(blocks: int) -> list[int]:
    """Blocks that each segment has room for, of a store of `blocks` blocks."""
    sizes: list[int] = []
    total = 0
    while total < blocks:
        sizes.append(min(SEGMENT, max(FIRST, total)))
        total += sizes[-1]
    return sizes


def capacity(blocks: int) -> int:
    """The sum of `capacities(blocks)`; at once, also of billions of blocks."""
    total = 0
    while total < min(blocks, SEGMENT):
        total += min(SEGMENT, max(FIRST, total))
    return total + -(-max(blocks - total, 0) // SEGMENT) * SEGMENT


class Segment(NamedTuple):
    """Memory for some blocks: numbers (G, n, BLOCK / P, D) and scales (G, n, groups of tokens, of channels, 1).

    Byte i of a block and channel holds tokens i, i + BLOCK / P, ...; the first in its lowest bits.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


@dataclass
class BlockStore:
    """The quantized blocks of a layer's keys, or of its values."""

    format: Format
    is_key: bool
    blocks: int = 0

    def __post_init__(self) -> None:
        self.segments: list[Segment] = []

    def append(self, numbers: Tensor) -> None:
        """Quantize and store (G, T, D), T a multiple of BLOCK."""
        numbers = numbers.unflatten(1, (-1, BLOCK))
        sizes = capacities(self.blocks + numbers.shape[1])
        self.segments += [self._segment(numbers, size) for size in sizes[len(self.segments) :]]
        first = 0
        for segment, size in zip(self.segments, sizes, strict=True):
            at = max(self.blocks - first, 0)  # blocks in use
            first += size
            if at < size:
                part, numbers = numbers[:, : size - at], numbers[:, size - at :]
                self._write(segment, at, part)
                self.blocks += part.shape[1]

    def _write(self, segment: Segment, at: int, numbers: Tensor) -> None:
        for memory, stored in zip(segment, self._quantize(numbers), strict=True):
            if memory is not None:
                memory[:, at : at + numbers.shape[1]] = stored

    def _segment(self, like: Tensor, blocks: int) -> Segment:
        heads, head_size = like.shape[0], like.shape[-1]
        tokens, channels = self.format.groups(head_size, self.is_key)
        scale = like.new_empty(heads, blocks, BLOCK // tokens, head_size // channels, 1)
        dtype = torch.uint8 if self.format.has_zero else FP8
        codes = torch.empty(heads, blocks, BLOCK // self.format.per_byte, head_size, dtype=dtype, device=like.device)
        return Segment(codes, scale, torch.empty_like(scale) if self.format.has_zero else None)

    def _quantize(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scale and zero point, as in `Segment`, of (G, n, BLOCK, D)."""
        tokens, channels = self.format.groups(numbers.shape[-1], self.is_key)
        grouped = numbers.unflatten(3, (-1, channels)).unflatten(2, (-1, tokens)).float()  # (G, n, gt, t, gc, c)
        tiny = torch.finfo(numbers.dtype).tiny
        if not self.format.has_zero:
            scale = (grouped.abs().amax((3, 5), True) / torch.finfo(FP8).max).clamp(min=tiny).to(numbers.dtype)
            return (grouped / scale.float()).reshape(numbers.shape).to(FP8), scale.squeeze(3), None
        low, high = grouped.amin((3, 5), True), grouped.amax((3, 5), True)
        most = 2**self.format.bits - 1
        scale = ((high - low) / most).clamp(min=tiny).to(numbers.dtype)  # rounded first: codes fit what is stored
        zero = low.to(numbers.dtype)
        codes = ((grouped - zero.float()) / scale.float()).round_().clamp_(0, most).to(torch.uint8)
        parts = codes.reshape(numbers.shape).unflatten(2, (self.format.per_byte, -1)).unbind(2)
        packed = parts[0].clone()
        for number, part in enumerate(parts[1:], 1):
            packed |= part << self.format.bits * number
        return packed, scale.squeeze(3), zero.squeeze(3)

    def dequantize(self, segment: int, blocks: int) -> Tensor:
        """(G, T, D) of the first `blocks` blocks of a segment."""
        memory = self.segments[segment]
        codes, scale = memory.codes[:, :blocks], memory.scale[:, :blocks]
        if memory.zero is None:
            return (codes.to(scale.dtype) * scale.squeeze(4)).flatten(1, 2)
        zero = memory.zero[:, :blocks]
        per_byte, channels = self.format.per_byte, codes.shape[-1] // scale.shape[3]
        out = scale.new_empty(*codes.shape[:2], per_byte, codes.shape[2], codes.shape[3])
        for number, part in enumerate(out.unflatten(4, (-1, channels)).unbind(2)):
            bits = codes if per_byte == 1 else (codes >> self.format.bits * number) & 2**self.format.bits - 1
            # one group of tokens, or one per token: then those of this part
            own = slice(None) if scale.shape[2] == 1 else slice(number * part.shape[2], (number + 1) * part.shape[2])
            torch.addcmul(zero[:, :, own], bits.unflatten(3, (-1, channels)), scale[:, :, own], out=part)
        return out.flatten(1, 3)

    def crop(self, blocks: int) -> None:
        """Keep the first `blocks` blocks."""
        self.blocks = blocks
        del self.segments[len(capacities(blocks)) :]


@dataclass
class History:
    """What a forward pass finds in a layer: its first `blocks` blocks, and the tokens (B, K, T, D) after them."""

    layer: "BlockQuantizedLayer"
    blocks: int
    keys: Tensor
    values: Tensor

    def segments(self) -> list[int]:
        """Number of blocks in each segment."""
        sizes = capacities(self.blocks)
        return [*sizes[:-1], self.blocks - sum(sizes[:-1])] if sizes else []

    def dequantized(self, segment: int, blocks: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, T, D) of a segment."""
        rows = len(self.keys)
        return tuple(store.dequantize(segment, blocks).unflatten(0, (rows, -1)) for store in self.layer.stores)  # type: ignore[return-value]


class BlockQuantizedLayer(DynamicLayer):
    """A layer of transformers' Cache. `keys` and `values` are views of the tokens after the last full block.

    Args:
        keeps_blocks: whether the attention function reads `history` of the keys that `update` returns, see
            component/inference/block_attention.py; else `update` returns all keys and values, dequantized.
    """

    def __init__(self, format_name: str, keeps_blocks: bool) -> None:
        super().__init__()
        self.is_initialized: bool = False
        self.stores = tuple(BlockStore(FORMATS[format_name], is_key) for is_key in (True, False))
        self.keeps_blocks = keeps_blocks
        self.recent: tuple[Tensor, ...] = ()  # keys and values (B, K, BLOCK, D) after the last full block
        self.forget_table()

    def forget_table(self) -> None:
        """`table` says where the first `table_blocks` blocks are, for component/inference/decode_kernel.py."""
        self.table: Tensor | None = None
        self.table_blocks = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, K, T, D); returns those to attend to.

        The tokens of one call attend to each other as computed, and to full blocks of earlier calls as quantized.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._hold([part[:, :, :0] for part in (key_states, value_states)])
        history = History(self, self.stores[0].blocks, self.keys, self.values)
        if self.keeps_blocks:
            key_states = key_states.view_as(key_states)  # a tensor of our own, for the attribute
            key_states.history = history  # type: ignore[attr-defined]
            returned = key_states, value_states
        else:
            parts = [history.dequantized(*item) for item in enumerate(history.segments())]
            pairs = zip(*parts, (self.keys, self.values), (key_states, value_states), strict=True)
            returned = tuple(torch.cat(pair, 2) for pair in pairs)  # type: ignore[assignment]
        self._append(key_states, value_states)
        return returned

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        count, new = self.keys.shape[2], key_states.shape[2]
        if count + new <= BLOCK:  # as in decoding: what the current forward pass reads stays where it is
            for memory, part in zip(self.recent, (key_states, value_states), strict=True):
                memory[:, :, count : count + new] = part
            if count + new == BLOCK:
                for store, memory in zip(self.stores, self.recent, strict=True):
                    store.append(memory.flatten(0, 1))
            self._view((count + new) % BLOCK)
            return
        rest = []
        for store, old, part in zip(self.stores, (self.keys, self.values), (key_states, value_states), strict=True):
            numbers = torch.cat([old, part], 2) if count else part
            full = numbers.shape[2] // BLOCK * BLOCK
            store.append(numbers[:, :, :full].flatten(0, 1))
            rest.append(numbers[:, :, full:])
        self._hold(rest)

    def _hold(self, parts: list[Tensor]) -> None:
        """Copy keys and values (B, K, T, D) of fewer than BLOCK tokens to new memory."""
        rows, heads, count, head_size = parts[0].shape
        self.recent = tuple(part.new_empty(rows, heads, BLOCK, head_size) for part in parts)
        for memory, part in zip(self.recent, parts, strict=True):
            memory[:, :, :count] = part
        self._view(count)

    def _view(self, count: int) -> None:
        self.keys, self.values = (memory[:, :, :count] for memory in self.recent)

    def get_seq_length(self) -> int:
        return self.stores[0].blocks * BLOCK + self.keys.shape[2] if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; inside of a quantized block only if all of it goes."""
        if not self.is_initialized or tokens_to_remove == 0:
            return
        left = self.get_seq_length() + tokens_to_remove
        blocks = min(left // BLOCK, self.stores[0].blocks)
        rest = left - blocks * BLOCK
        assert rest == 0 or blocks == self.stores[0].blocks, f"{left} tokens end inside of a quantized block"
        self.forget_table()  # what is written next may be elsewhere
        for store in self.stores:
            store.crop(blocks)
        self._view(rest)

    def reset(self) -> None:
        self.keys = self.values = None
        self.recent = ()
        self.is_initialized = False
        self.forget_table()
        for store in self.stores:
            store.crop(0)
