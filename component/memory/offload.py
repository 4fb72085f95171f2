"""Where do a layer's inputs wait for the backward pass? On the host, in buffers that are pinned once and used again.

A stack: what the forward pass puts last, the backward pass takes first. Copies run on a stream of their own beside the
computation: going out, while the next layer computes; coming back, one layer ahead of need.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from component.error import UserError


class ActivationOffloader:
    """Tensors of a GPU kept in host memory between forward and backward. On a CPU it keeps plain copies."""

    def __init__(self, fetches_ahead: bool = True) -> None:
        self.fetches_ahead = fetches_ahead  # what a layer will need comes while the one above it computes
        self._buffers: list[Tensor] = []  # bytes, pinned; the n-th belongs to the n-th entry of the stack
        finalizer = weakref.finalize(self, _unpin, self._buffers)  # memory given back pinned cannot be pinned again
        finalizer.atexit = False
        self._entries: list[_Entry] = []
        self._leaving: tuple[list[Tensor], torch.cuda.Event] | None = None
        self._stream: torch.cuda.Stream | None = None

    def __deepcopy__(self, memo: dict) -> "ActivationOffloader":
        """A copied model gets a stack of its own, with nothing on it."""
        return ActivationOffloader(self.fetches_ahead)

    @property
    def nbytes(self) -> int:
        """Host memory that the buffers hold."""
        return sum(len(buffer) for buffer in self._buffers)

    def clear(self) -> None:
        """Forget what waits, keep the buffers: for a forward pass whose backward pass never came."""
        self._settle()
        self._entries.clear()

    def put(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Copy `tensors` out; calling the result brings them back. Results are called last put, first called."""
        self._settle()
        depth = len(self._entries)
        parts = self._buffer(depth, tensors)
        if tensors[0].is_cuda:
            stream = self._side_stream(tensors[0].device)
            stream.wait_stream(torch.cuda.current_stream(tensors[0].device))
            with torch.cuda.stream(stream):
                for part, tensor in zip(parts, tensors, strict=True):
                    part.copy_(tensor, non_blocking=True)
            self._leaving = (tensors, stream.record_event())
        else:
            for part, tensor in zip(parts, tensors, strict=True):
                part.copy_(tensor)
        entry = _Entry(parts, tensors[0].device)
        self._entries.append(entry)

        def take() -> list[Tensor]:
            is_last = bool(self._entries) and self._entries[-1] is entry
            assert is_last, "layers go back in another order than they came, or after another forward pass"
            self._settle()
            self._entries.pop()
            self._fetch(entry)
            if self._entries and self.fetches_ahead:
                self._fetch(self._entries[-1])
            return entry.arrived()

        return take

    def _settle(self) -> None:
        """What is on its way out may be freed once it is copied: in practice it long is."""
        if self._leaving is not None:
            tensors, copied = self._leaving
            torch.cuda.current_stream(tensors[0].device).wait_event(copied)
            self._leaving = None

    def _fetch(self, entry: "_Entry") -> None:
        if entry.tensors is not None:
            return
        # allocated for the computing stream, so that they may be freed there: hence the copy waits for that stream
        entry.tensors = [torch.empty_like(part, device=entry.device) for part in entry.parts]
        if entry.device.type != "cuda":
            for part, tensor in zip(entry.parts, entry.tensors, strict=True):
                tensor.copy_(part)
            return
        stream = self._side_stream(entry.device)
        stream.wait_stream(torch.cuda.current_stream(entry.device))
        with torch.cuda.stream(stream):
            for part, tensor in zip(entry.parts, entry.tensors, strict=True):
                tensor.copy_(part, non_blocking=True)
        entry.copied = stream.record_event()

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def _buffer(self, depth: int, tensors: list[Tensor]) -> list[Tensor]:
        """Pinned memory at `depth` of the stack, in the types and shapes of `tensors`."""
        sizes = [-(-tensor.nbytes // 256) * 256 for tensor in tensors]  # each part starts aligned
        if depth == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if len(self._buffers[depth]) < sum(sizes):
            if self._stream is not None:
                self._stream.synchronize()  # nothing may still be read from the buffer that goes
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
        self.tensors: list[Tensor] | None = None
        self.copied: torch.cuda.Event | None = None

    def arrived(self) -> list[Tensor]:
        assert self.tensors is not None
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        return self.tensors


def _pin(buffer: Tensor, is_needed: bool) -> Tensor:
    # PyTorch's own pinned memory comes in powers of two: 128 MiB for the 80 MiB of a 13B model's 8192 tokens
    if is_needed:
        result = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), len(buffer), 0)
        if int(result) != 0:
            raise UserError(
                f"offload_activations: {len(buffer) / 2**20:.0f} MiB of host memory could not be pinned (CUDA error "
                f"{int(result)}); free host memory, set offload_activations: false, or shorten max_seq_length"
            )
    return buffer


def _unpin(buffers: list[Tensor]) -> None:
    for buffer in buffers:
        if len(buffer) and torch.cuda.is_available():
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
