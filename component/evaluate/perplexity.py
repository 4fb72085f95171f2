"""What is the perplexity of a model on a file of tokens? It depends on the protocol, so each result names its own.

longlora: the published tables' (LongLoRA's eval.py). Windows of `seq_len` tokens every `stride` tokens; every token of
    a window but its first is scored; the mean losses of the windows are averaged. As there, windows start at
    0, stride, 2 stride ... below (tokens - seq_len), and the last of these is left out: a file of seq_len + stride
    tokens or fewer holds no window.
sliding: each token of the file but the first is scored exactly once, with as much left context as the window allows;
    all tokens weigh the same. A file of seq_len tokens or fewer is one window; with one token more there is a second
    window, shifted by one, that scores only that token.

Sums by position in the window and by document: component/evaluate/aggregate.py. Key tokens, for LongPPL:
component/evaluate/long_ppl.py.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from component.distributed.world import gathered, is_first_process, own_share, process_count, results_once
from component.error import UserError
from component.evaluate.aggregate import (
    Document,
    PositionBucket,
    WindowSum,
    by_document,
    by_position,
    perplexity_of,
    sum_window,
)
from component.evaluate.flags import PROTOCOLS
from component.evaluate.split import losses_of
from component.loading import default_device, free_memory, inference_dtype

# (numbers of B windows, their ids (B, T), the losses of all their tokens but the first (B, T - 1))
#     -> for each window the positions of its key tokens
KeyTokenSource = Callable[[range, Tensor, Tensor], list[np.ndarray]]


@dataclass
class Window:
    """Tokens [start, end) are fed to the model, tokens [first_scored, end) are scored."""

    start: int
    first_scored: int
    end: int


@dataclass
class Perplexity:
    protocol: str
    seq_len: int  # tokens per window
    stride: int  # tokens from one window to the next
    windows: int
    tokens_scored: int
    loss: float  # nats per token
    perplexity: float
    by_position: list[PositionBucket]  # empty without buckets
    by_document: list[Document]  # empty if the starts of documents are unknown
    processes: int
    seconds: float
    tokens_per_second: float  # fed to the model, by all processes together
    peak_allocated_gib: float | None  # device memory of tensors, highest of all processes; None without a GPU
    peak_reserved_gib: float | None  # the same, as reserved by PyTorch's allocator
    long_ppl: float | None = None  # perplexity over the key tokens alone; None without any
    key_tokens: int | None = None  # None if they were not looked for
    key_token_share: float | None = None  # of the tokens scored


def longlora_windows(tokens: int, seq_len: int, stride: int) -> list[Window]:
    return [Window(start, start + 1, start + seq_len) for start in range(0, tokens - seq_len, stride)][:-1]


def sliding_windows(tokens: int, seq_len: int, stride: int) -> list[Window]:
    stride = min(stride, seq_len - 1)  # the first token of a window has no left context
    windows: list[Window] = []
    scored = 1
    while scored < tokens:
        # the first window scores all its tokens, each later one `stride` new ones
        end = min(seq_len if not windows else scored + stride, tokens)
        windows.append(Window(max(0, end - seq_len), scored, end))
        scored = end
    return windows


def plan_windows(tokens: int, seq_len: int, stride: int, protocol: str) -> list[Window]:
    """The windows of a file.

    Raises:
        UserError: the file is too short for one.
    """
    windows = (longlora_windows if protocol == "longlora" else sliding_windows)(tokens, seq_len, stride)
    if not windows:
        need = seq_len + stride + 1 if protocol == "longlora" else 2
        cure = "shorten seq_len or use --protocol sliding" if protocol == "longlora" else "name a longer file"
        raise UserError(
            f"data_path: {tokens} tokens hold no window of seq_len {seq_len} at sliding_window {stride} under "
            f"protocol {protocol}, which needs {need}; {cure}"
        )
    return windows


def check_measure(protocol: str, seq_len: int, stride: int, batch_size: int, position_buckets: int) -> None:
    """Refuse values that are invalid for any file."""
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol: {protocol!r} is none of {', '.join(PROTOCOLS)}")
    if seq_len < 2 or stride < 1 or batch_size < 1 or position_buckets < 0:
        raise UserError(
            f"seq_len {seq_len}, sliding_window {stride}, batch_size {batch_size}, position_buckets "
            f"{position_buckets}; use at least 2, 1, 1 and 0"
        )


def measure_perplexity(
    model: PreTrainedModel,
    tokens: np.ndarray,
    *,
    seq_len: int,
    stride: int,
    protocol: str = "longlora",
    batch_size: int = 1,
    position_buckets: int = 16,
    document_starts: Sequence[int] | None = None,
    key_tokens: KeyTokenSource | None = None,
) -> Perplexity:
    """Perplexity of `model` on `tokens`; all processes share the work, and each gets the result.

    Args:
        position_buckets: number of buckets for results by position, at most `seq_len`; 0 for none.
        document_starts: first token of each document, ascending from 0.
        key_tokens: which tokens count for LongPPL; None: it is not measured.

    Raises:
        UserError: unknown protocol, a number below its minimum, or a file too short for one window.
    """
    check_measure(protocol, seq_len, stride, batch_size, position_buckets)
    windows = plan_windows(len(tokens), seq_len, stride, protocol)
    starts = None if document_starts is None else np.asarray(document_starts)
    buckets, begin = min(position_buckets, seq_len), time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    own = []
    for batch, ids, losses in window_losses(model, tokens, windows, batch_size):
        keys = key_tokens(batch, ids, losses) if key_tokens else [None] * len(batch)
        for number, row, positions in zip(batch, losses, keys, strict=True):
            edges = (windows[number].start, windows[number].first_scored)
            own.append(
                sum_window(number, row, *edges, positions, seq_len=seq_len, buckets=buckets, document_starts=starts)
            )
    sums = sorted(results_once(own), key=lambda window: window.number)
    loss = mean_loss(sums, protocol)
    return Perplexity(
        protocol,
        seq_len,
        stride,
        len(windows),
        sum(window.tokens for window in sums),
        loss,
        perplexity_of(loss),
        by_position(sums, seq_len, buckets),
        by_document(sums, starts) if starts is not None else [],
        process_count(),
        *_cost(begin, tokens=sum(window.end - window.start for window in windows)),
        *(_long_ppl(sums) if key_tokens else ()),
    )


def mean_loss(sums: list[WindowSum], protocol: str) -> float:
    """Nats per token: all windows weigh the same under `longlora`, all tokens under `sliding`."""
    if protocol == "longlora":
        return sum(window.loss / window.tokens for window in sums) / len(sums)
    return sum(window.loss for window in sums) / sum(window.tokens for window in sums)


def _long_ppl(sums: list[WindowSum]) -> tuple[float | None, int, float]:
    """LongPPL, key tokens, their share of the tokens scored; under both protocols all key tokens weigh the same."""
    keys = sum(window.key_tokens for window in sums)
    loss = sum(window.key_loss for window in sums)
    return perplexity_of(loss / keys) if keys else None, keys, keys / sum(window.tokens for window in sums)


def window_losses(
    model: PreTrainedModel, tokens: np.ndarray, windows: list[Window], batch_size: int, task: str = ""
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Yield this process's windows in batches of B: numbers, ids (B, T), losses (B, T - 1) of all but the first token.

    All windows have the same length. Processes share whole batches, so that batches do not depend on their number.
    """
    device = model.get_input_embeddings().weight.device
    batches = own_share([range(at, min(at + batch_size, len(windows))) for at in range(0, len(windows), batch_size)])
    length = windows[0].end - windows[0].start
    total = sum(map(len, batches))
    disable = None if is_first_process() else True  # None: without a terminal
    with tqdm(total=total, desc=f"{task}seq_len {length}", unit="window", disable=disable) as bar:
        for batch in batches:
            spans = [windows[number] for number in batch]
            rows = np.stack([tokens[window.start : window.end] for window in spans]).astype(np.int64)
            ids = torch.from_numpy(rows).to(device)
            yield batch, ids, losses_of(model, ids)
            bar.update(len(batch))


def _cost(begin: float, tokens: int) -> tuple[float, float, float | None, float | None]:
    """Seconds since `begin`, tokens per second, and peak allocated and reserved device memory in GiB."""
    seconds = max(time.monotonic() - begin, 1e-9)
    if not torch.cuda.is_available():
        return seconds, tokens / seconds, None, None
    peaks = gathered([(torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30)])
    allocated, reserved = (max(values) for values in zip(*peaks, strict=True))
    return seconds, tokens / seconds, allocated, reserved


def measure_all(
    loaders: Mapping[str, Callable[..., PreTrainedModel]], tokens, seq_len: int, stored: torch.dtype | None = None
) -> dict[str, list[Perplexity]]:
    """Perplexity of several models, with one in memory at a time, all in one dtype; `stored`: their config's."""
    device = default_device()
    dtype, results = inference_dtype(device, stored), {}
    for name, load in loaders.items():
        model = load(dtype=dtype, device=device)
        results[name] = [measure_perplexity(model, tokens, seq_len=seq_len, stride=seq_len, position_buckets=0)]
        del model
        free_memory()
    return results
