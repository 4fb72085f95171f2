"""How surprised is the model? Windows over a file of tokens, and what is averaged over what.

Perplexities of one model differ by tens of per cent between protocols, so each result names its own:

longlora: the published tables' (LongLoRA's eval.py). A window of `seq_len` tokens every `stride` tokens; every token
    of a window but its first is scored; the mean losses of the windows are averaged. As there, windows start at
    0, stride, 2 stride ... below (tokens - seq_len), and the last of these is left out: a file of seq_len + stride
    tokens or fewer holds no window.
sliding: each token of the file is scored exactly once (the very first has nothing before it), with as much left
    context as the window allows; tokens weigh alike.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from component.error import UserError
from component.memory import next_token_losses

PROTOCOLS = ("longlora", "sliding")


@dataclass
class Window:
    """Tokens [start, end) go through the model, tokens [first_scored, end) are scored."""

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


def longlora_windows(tokens: int, seq_len: int, stride: int) -> list[Window]:
    return [Window(start, start + 1, start + seq_len) for start in range(0, tokens - seq_len, stride)][:-1]


def sliding_windows(tokens: int, seq_len: int, stride: int) -> list[Window]:
    stride = min(stride, seq_len - 1)  # the first token of a window has nothing before it to be predicted from
    windows: list[Window] = []
    scored = 1
    while scored < tokens:
        # the first window scores all it holds, each later one `stride` new tokens
        end = min(seq_len if not windows else scored + stride, tokens)
        windows.append(Window(max(0, end - seq_len), scored, end))
        scored = end
    return windows


def measure_perplexity(
    model: PreTrainedModel,
    tokens: np.ndarray,
    *,
    seq_len: int,
    stride: int,
    protocol: str = "longlora",
    batch_size: int = 1,
) -> Perplexity:
    """Perplexity of `model` on `tokens`, with a progress bar.

    Raises:
        UserError: unknown protocol, windows shorter than 2 tokens, a stride below 1, or a file without any window.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol: {protocol!r} is none of {', '.join(PROTOCOLS)}")
    if seq_len < 2 or stride < 1 or batch_size < 1:
        raise UserError(
            f"seq_len {seq_len}, sliding_window {stride}, batch_size {batch_size}: a window has at least 2 tokens, "
            "windows are at least 1 token apart, and a batch has at least 1 window"
        )
    windows = (longlora_windows if protocol == "longlora" else sliding_windows)(len(tokens), seq_len, stride)
    if not windows:
        need = seq_len + stride + 1 if protocol == "longlora" else 2
        raise UserError(
            f"data_path: {len(tokens)} tokens hold no window of seq_len {seq_len} at sliding_window {stride} under "
            f"protocol {protocol}, which needs {need}; shorten seq_len or use --protocol sliding"
        )
    sums, counts = [], []
    for window, losses in _window_losses(model, tokens, windows, batch_size):
        scored = losses[window.first_scored - window.start - 1 :]
        sums.append(float(scored.sum(dtype=torch.float64)))
        counts.append(len(scored))
    if protocol == "longlora":
        loss = sum(total / count for total, count in zip(sums, counts, strict=True)) / len(windows)
    else:
        loss = sum(sums) / sum(counts)
    perplexity = math.exp(loss) if loss < 700 else math.inf  # a float's exp ends at 709
    return Perplexity(protocol, seq_len, stride, len(windows), sum(counts), loss, perplexity)


def _window_losses(
    model: PreTrainedModel, tokens: np.ndarray, windows: list[Window], batch_size: int
) -> Iterator[tuple[Window, torch.Tensor]]:
    """Each window with the losses (end - start - 1,) of its tokens but the first. All windows are of one length."""
    device = model.get_input_embeddings().weight.device
    with tqdm(total=len(windows), desc=f"{windows[0].end - windows[0].start} tokens", unit="window") as bar:
        for at in range(0, len(windows), batch_size):
            batch = windows[at : at + batch_size]
            rows = np.stack([tokens[window.start : window.end] for window in batch]).astype(np.int64)
            yield from zip(batch, next_token_losses(model, torch.from_numpy(rows).to(device)), strict=True)
            bar.update(len(batch))
