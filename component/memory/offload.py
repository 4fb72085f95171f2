"""How are activations offloaded to CPU memory until the backward pass? Into reused pinned buffers.

Last in, first out: the backward pass fetches in the reverse order of the forward pass. Copies run on their own CUDA
stream and overlap with computation: out while the next layer runs, back in one layer ahead. The first tensor of a
layer is fetched from when the layer above starts; the others from `fetch_rest` on, after that layer's peak of memory.
"""

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from component.error import UserError


class ActivationOffloader:
    """GPU tensors held in pinned CPU memory between forward and backward; for CPU tensors, plain copies."""

    def __init__(self, fetches_ahead: bool = True) -> None:
        self.fetches_ahead = fetches_ahead  # prefetch a layer's tensors while the layer above runs its backward
        self._buffers: list[Tensor] = []  # pinned bytes; the n-th buffer belongs to the n-th entry
        finalizer = weakref.finalize(self, _unpin, self._buffers)  # memory freed while pinned cannot be pinned again
        finalizer.atexit = False
        self._entries: list[_Entry] = []
        self._taken: _Entry | None = None  # whose tensors are being used
        self._outgoing: tuple[list[Tensor], torch.cuda.Event] | None = None
        self._stream: torch.cuda.Stream | None = None

    def __deepcopy__(self, memo: dict) -> "ActivationOffloader":
        """A copied model gets its own, empty offloader."""
        return ActivationOffloader(self.fetches_ahead)

    @property
    def nbytes(self) -> int:
        """Size of the buffers."""
        return sum(len(buffer) for buffer in self._buffers)

    def clear(self) -> None:
        """Drop all entries but keep the buffers, after a forward pass without a backward pass."""
        self._release_outgoing()
        for entry in [*self._entries, *([self._taken] if self._taken else [])]:
            list(entry.arriving())  # else a copy under way would write to memory that is in use again
        self._entries.clear()
        self._taken = None

    def forget(self) -> None:
        """Drop all entries without waiting for copies, of which a failed recording of a CUDA graph did none."""
        self._outgoing = self._taken = None
        self._entries.clear()

    def put(self, tensors: list[Tensor]) -> Callable[[], Iterator[Tensor]]:
        """Offload `tensors`. The returned function fetches them, to be called in reverse order of `put`.

        Its result yields them in their order; each is waited for when it is asked for, and not held here any longer.
        """
        self._release_outgoing()
        depth = len(self._entries)
        parts = self._buffer(depth, tensors)
        if tensors[0].is_cuda:
            stream = self._side_stream(tensors[0].device)
            stream.wait_stream(torch.cuda.current_stream(tensors[0].device))
            with torch.cuda.stream(stream):
                for part, tensor in zip(parts, tensors, strict=True):
                    part.copy_(tensor, non_blocking=True)
            self._outgoing = (tensors, stream.record_event())
        else:
            for part, tensor in zip(parts, tensors, strict=True):
                part.copy_(tensor)
        entry = _Entry(parts, tensors[0].device)
        self._entries.append(entry)

        def fetch() -> Iterator[Tensor]:
            is_last = bool(self._entries) and self._entries[-1] is entry
            assert is_last, "fetched out of order, or after another forward pass"
            self._release_outgoing()
            self._taken = self._entries.pop()
            self._fetch(entry, len(entry.parts))
            if self._entries and self.fetches_ahead:
                self._fetch(self._entries[-1], 1)
            return entry.arriving()

        return fetch

    def fetch_rest(self) -> None:
        """Start to fetch what is left of the layer below."""
        if self._entries and self.fetches_ahead:
            self._fetch(self._entries[-1], len(self._entries[-1].parts))

    def _release_outgoing(self) -> None:
        """Drop the tensors of the last `put` once their copy is done; usually it has been for long."""
        if self._outgoing is not None:
            tensors, copied = self._outgoing
            torch.cuda.current_stream(tensors[0].device).wait_event(copied)
            self._outgoing = None

    def _fetch(self, entry: "_Entry", count: int) -> None:
        """Start to fetch the first `count` tensors of `entry`, but those that are on their way."""
        parts = entry.parts[len(entry.fetched) : count]
        if not parts:
            return
        # allocated on the compute stream, where they are freed; so the copy has to wait for that stream
        tensors = [torch.empty_like(part, device=entry.device) for part in parts]
        if entry.device.type != "cuda":
            for part, tensor in zip(parts, tensors, strict=True):
                entry.fetched.append((tensor.copy_(part), None))
            return
        stream = self._side_stream(entry.device)
        stream.wait_stream(torch.cuda.current_stream(entry.device))
        with torch.cuda.stream(stream):
            for part, tensor in zip(parts, tensors, strict=True):
                tensor.copy_(part, non_blocking=True)
                entry.fetched.append((tensor, stream.record_event()))

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def _buffer(self, depth: int, tensors: list[Tensor]) -> list[Tensor]:
        """The buffer of entry `depth`, viewed in the dtypes and shapes of `tensors`."""
        sizes = [-(-tensor.nbytes // 256) * 256 for tensor in tensors]  # alignment
        if depth == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if len(self._buffers[depth]) < sum(sizes):
            if self._stream is not None:
                self._stream.synchronize()  # copies from the old buffer may still be running
            _unpin(self._buffers[depth : depth + 1])
            self._buffers[depth] = _pin(torch.empty(sum(sizes), dtype=torch.uint8), tensors[0].is_cuda)
        parts = self._buffers[depth][: sum(sizes)].split(sizes)
        return [
            part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for part, tensor in zip(parts, tensors, strict=True)
        ]


class _Entry:
    def __init__(self, parts: list[Tensor], device: torch.device):
        self.parts, self.device = parts, device
        self.fetched: list[tuple[Tensor, torch.cuda.Event | None]] = []  # each with the end of its copy

    def arriving(self) -> Iterator[Tensor]:
        """The fetched tensors, each for use on the stream that is current then."""
        while self.fetched:
            yield self._arrived(*self.fetched.pop(0))  # not by a name, which would keep it

    def _arrived(self, tensor: Tensor, copied: torch.cuda.Event | None) -> Tensor:
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
        return tensor


def _pin(buffer: Tensor, is_needed: bool) -> Tensor:
    # PyTorch's pinned allocator rounds up to powers of two: 128 MiB for the 80 MiB of a 13B model's 8192 tokens
    if is_needed:
        result = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), len(buffer), 0)
        if int(result) != 0:
            raise UserError(
                f"offload_activations: {len(buffer) / 2**20:.0f} MiB of CPU memory could not be pinned (CUDA error "
                f"{int(result)}); free CPU memory, set offload_activations: false, or shorten max_seq_length"
            )
    return buffer


def _unpin(buffers: list[Tensor]) -> None:
    for buffer in buffers:
        if len(buffer) and torch.cuda.is_available():
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
