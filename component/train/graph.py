"""How is a micro-batch launched at once? Its forward and backward pass become a CUDA graph, which is replayed.

A 7B's 8192 tokens take 9,000 kernels. In FP8 an H200 computes them in 0.33 s, but a CPU takes 0.3 to 0.5 s to launch
them one by one; a graph is launched in one call. It replays the same kernels on the same addresses, so it serves
micro-batches of the shape that was recorded, without padding, whose rows are one document each. Others are computed as
ever. A graph keeps its memory while it exists, so it is dropped before anything else needs that memory.

Nothing that Python computes is repeated in a replay. So a graph is recorded with empty inputs, and first replayed for
a micro-batch that was also computed without it; losses and gradients are compared.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from component.attention.shift_short import document_spans
from component.cli import show
from component.error import first_line

WARM_UP = 2  # micro-batches of a shape before it is recorded: kernels are compiled and buffers allocated
ATTEMPTS = 2  # to record, if the first one fails: a library may have to load something
RECORDINGS, REPLAYS = 16, 8  # from so many recordings on, each must have been replayed so often to be worth its time
LOSS_ERROR, NORM_ERROR = 1e-3, 2e-2  # relative: kernels of attention sum in another order each time

Inputs = dict[str, Tensor]
Compute = Callable[[Inputs, Tensor], Tensor]


class Recording:
    """A function without arguments, recorded on the GPU."""

    def __init__(self, compute: Callable[[], Tensor]):
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = compute()
        finally:
            torch.cuda.set_stream(stream)  # PyTorch leaves the recording's stream in place if its end fails

    def replay(self) -> Tensor:
        """What the function returned, for the current contents of the tensors that it reads."""
        self._graph.replay()
        return self._result


class GraphedSteps:
    """Computes losses of micro-batches, and adds their gradients, by a CUDA graph.

    Args:
        compute: (inputs, number of labels in all micro-batches of the step) -> loss; what is recorded.
        parameters: the trained ones.
        setting: what else a recording depends on, such as the size of attention's groups.
        train: as `compute`, and adds the gradients; what is done without a graph, and compared with one.
        forget: called after a recording that failed, to drop what it left half done.
        record: makes a recording (`Recording`).
    """

    def __init__(
        self,
        compute: Compute,
        parameters: list[nn.Parameter],
        setting: Callable[[], Any],
        train: Compute,
        forget: Callable[[], None] = lambda: None,
        record: Callable[[Callable[[], Tensor]], Any] | None = None,
    ):
        self._compute, self._parameters, self._setting, self._train = compute, parameters, setting, train
        self._forget, self._record = forget, record or Recording
        self._key: Any = None
        self._seen = self._recorded = self._failed = self.replayed = 0
        self._is_off = False
        self._compared = set[Any]()  # keys
        self._recording: Any = None
        self._gradients: list[Tensor] | None = None
        self._inputs: Inputs = {}

    def step(self, inputs: Inputs, items: Any) -> Tensor | None:
        """The loss, with gradients added to those of the parameters; None if the caller has to compute both.

        Args:
            inputs: of the model, (B, T) each.
            items: number of labels in all micro-batches of the step, a tensor.
        """
        if not isinstance(items, Tensor) or self._is_off or not is_uniform(inputs):
            self.release()
            return None
        given = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"} | {"items": items}
        key = (self._setting(), *((name, tensor.shape, tensor.dtype) for name, tensor in given.items()))
        if key != self._key:
            self.release()
            self._key, self._seen = key, 0
        self._seen += 1
        if self._recording is None:
            is_first = all(parameter.grad is None for parameter in self._parameters)
            if self._seen <= WARM_UP or not is_first or not self._start(given, inputs, items):
                return None
        self.replayed += 1
        return self._replay(given)

    def forget_gradients(self) -> None:
        if self._gradients is None:
            for parameter in self._parameters:
                parameter.grad = None
        else:
            torch._foreach_zero_(self._gradients)  # recorded kernels add to these tensors

    def release(self) -> None:
        """Free what the recording holds; the gradients so far stay."""
        if self._recording is not None or self._gradients is not None:
            self._recording = self._gradients = self._key = None
            self._inputs = {}
            if torch.cuda.is_available():
                with suppress(RuntimeError):  # some versions of PyTorch refuse after a recording that failed
                    torch.cuda.empty_cache()

    def _replay(self, given: Inputs) -> Tensor:
        for name, tensor in given.items():
            self._inputs[name].copy_(tensor)
        assert self._gradients is not None
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not gradient:  # somebody else's
                gradient.zero_() if parameter.grad is None else gradient.copy_(parameter.grad)
                parameter.grad = gradient
        return self._recording.replay().clone()

    def _start(self, given: Inputs, inputs: Inputs, items: Tensor) -> bool:
        """Record; False where the recording fails, or computes something else, which is then the last one."""
        if self._recorded >= RECORDINGS and self.replayed < REPLAYS * self._recorded:
            return self._leave_out(f"lengths, padding or documents changed {self._recorded} times")
        self._recorded += 1
        expected, is_tried_again = None, False
        if self._key not in self._compared:
            expected = self._result(self._train(dict(inputs), items))
            self.forget_gradients()
        if expected is not None and not math.isfinite(expected[0]):  # the caller computes it again, and says so
            return False
        self._inputs = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        try:
            self._recording = self._record(self._loss_and_gradients)
            problem = None if expected is None else difference(expected, self._result(self._replay(given)))
        except RuntimeError as error:  # out of memory too: it was trained without a graph before
            self._forget()
            self._failed += 1
            is_tried_again = self._failed < ATTEMPTS
            problem = first_line(_cause(error))
        if problem is None:
            self._compared.add(self._key)
            self.forget_gradients()
            return True
        self.release()
        self.forget_gradients()
        return False if is_tried_again else self._leave_out(problem)

    def _leave_out(self, problem: str) -> bool:
        show(f"cuda_graph: left out from here on; {problem}")
        self._is_off = True
        return False

    def _result(self, loss: Tensor) -> tuple[float, Tensor]:
        """`loss` as a number, and the norms of all gradients."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        return float(loss.detach()), torch.stack(torch._foreach_norm(gradients)).float().cpu()

    def _loss_and_gradients(self) -> Tensor:
        inputs = dict(self._inputs)
        loss = self._compute(inputs, inputs.pop("items"))
        loss.backward()
        return loss.detach()


def _cause(error: BaseException) -> BaseException:
    """What failed in a recording: the end of it raises another error."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def is_uniform(inputs: Inputs) -> bool:
    """Whether no row is padded, and each is one document; waits for the GPU."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and not bool(mask.all()):
        return False
    return positions is None or document_spans(positions) is None


def difference(expected: tuple[float, Tensor], found: tuple[float, Tensor]) -> str | None:
    """What differs between (loss, norms of the gradients) without and with a graph; None if nothing does."""
    if not abs(found[0] - expected[0]) <= LOSS_ERROR * abs(expected[0]):  # NaN too
        return f"the loss was {found[0]:.6g} instead of {expected[0]:.6g}"
    allowed = NORM_ERROR * (expected[1] + expected[1].square().mean().sqrt())
    wrong = ~((found[1] - expected[1]).abs() <= allowed)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        return (
            f"the norms of {int(wrong.sum())} of {len(wrong)} gradients differ, one was {float(found[1][at]):.6g} "
            f"instead of {float(expected[1][at]):.6g}"
        )
    return None
