"""How is a micro-batch launched at once? Its forward and backward pass become a CUDA graph, which is replayed.

A 7B's 8192 tokens take 9,000 kernels. In FP8 an H200 computes them in 0.33 s, but a CPU takes 0.3 to 0.5 s to launch
them one by one; a graph is launched in one call. It replays the same kernels on the same addresses, so it serves
micro-batches of the shape that was recorded, without padding, whose rows are one document each. Others are computed as
ever. A graph keeps its memory while it exists, so it is dropped before anything else needs that memory.

Nothing that Python computes is repeated in a replay. So a micro-batch is also computed without the graph when it is
recorded, and losses and gradients are compared.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from component.attention.shift_short import document_spans
from component.cli import show
from component.error import first_line

WARM_UP = 2  # micro-batches of a shape before it is recorded: kernels are compiled and buffers allocated
RECORDINGS = 16  # in a run; where shapes change more often, they cost more than they save
ATTEMPTS = 2  # to record, if the first one fails: a library may have to load something
LOSS_ERROR, NORM_ERROR = 1e-3, 2e-2  # relative: kernels of attention sum in another order each time

Inputs = dict[str, Tensor]


class Recording:
    """A function without arguments, recorded on the GPU."""

    def __init__(self, compute: Callable[[], Tensor]):
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = compute()

    def replay(self) -> Tensor:
        """What the function returned, for the current contents of the tensors that it reads."""
        self._graph.replay()
        return self._result


class GraphedSteps:
    """Computes losses of micro-batches, and adds their gradients, by a CUDA graph.

    Args:
        compute: (inputs, number of labels in all micro-batches of the step) -> loss.
        parameters: the trained ones.
        setting: what else a recording depends on, such as the size of attention's groups.
        forget: called after a recording that failed, to drop what it left half done.
        record: makes a recording.
    """

    def __init__(
        self,
        compute: Callable[[Inputs, Tensor], Tensor],
        parameters: list[nn.Parameter],
        setting: Callable[[], Any],
        forget: Callable[[], None] = lambda: None,
        record: Callable[[Callable[[], Tensor]], Any] = Recording,
    ):
        self._compute, self._parameters, self._setting, self._record = compute, parameters, setting, record
        self._forget = forget
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
            if self._seen <= WARM_UP or not is_first or not self._start(given):
                return None
        else:
            for name, tensor in given.items():
                self._inputs[name].copy_(tensor)
        self.replayed += 1
        return self._recording.replay().clone()

    def forget_gradients(self) -> None:
        if self._gradients is None:
            for parameter in self._parameters:
                parameter.grad = None
        else:
            torch._foreach_zero_(self._gradients)  # recorded kernels add to these tensors

    def release(self) -> None:
        """Free what the recording holds; the gradients so far stay."""
        if self._recording is not None:
            self._recording = self._gradients = self._key = None
            self._inputs = {}
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _start(self, given: Inputs) -> bool:
        """Record; False where the recording fails, or computes something else, which is then the last one."""
        if self._recorded == RECORDINGS:
            return self._leave_out(f"batches changed {RECORDINGS} times to another length, padding or documents")
        self._recorded += 1
        is_tried_again = False
        is_known = self._key in self._compared
        expected = None if is_known else self._computed(given)
        self._inputs = {name: tensor.clone() for name, tensor in given.items()}
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        try:
            self._recording = self._record(self._loss_and_gradients)
            found = None if is_known else (float(self._recording.replay()), float(get_total_norm(self._gradients)))
            problem = None if expected is None or found is None else difference(expected, found)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._forget()
            self._failed += 1
            is_tried_again = self._failed < ATTEMPTS
            problem = first_line(_cause(error))
        if problem is None:
            self._compared.add(self._key)
            torch._foreach_zero_(self._gradients)
            return True
        self._recording = self._recording or object()  # so that `release` frees the rest
        self.release()
        self.forget_gradients()
        return False if is_tried_again else self._leave_out(problem)

    def _leave_out(self, problem: str) -> bool:
        show(f"cuda_graph: left out from here on; {problem}")
        self._is_off = True
        return False

    def _computed(self, given: Inputs) -> tuple[float, float]:
        """The loss and the norm of its gradients, without a graph."""
        self._inputs = given
        loss = float(self._loss_and_gradients())
        norm = float(get_total_norm([p.grad for p in self._parameters if p.grad is not None]))
        for parameter in self._parameters:
            parameter.grad = None
        return loss, norm

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


def difference(expected: tuple[float, float], found: tuple[float, float]) -> str | None:
    """What differs between (loss, norm of the gradients) without and with a graph; None if nothing does."""
    names = ("loss", LOSS_ERROR), ("norm of the gradients", NORM_ERROR)
    for (name, error), right, other in zip(names, expected, found, strict=True):
        if not abs(other - right) <= error * abs(right):  # NaN too
            return f"the {name} was {other:.6g} instead of {right:.6g}"
    return None
