"""The published perplexity protocol, slow and plain: LongLoRA's eval.py (arXiv 2309.12307, section 4).

There, windows start every `sliding_window` tokens below `len(data) - seq_len`, the last start is dropped, the labels
of a batch are its own ids, and the result is 2.71828 to the power of the mean loss over windows. Here e is exact, and
a batch is one window.
"""

import math

import torch


def longlora_perplexity(model, tokens, seq_len: int, sliding_window: int) -> float:
    starts = list(range(0, len(tokens) - seq_len, sliding_window))
    starts.pop()
    losses = []
    for start in starts:
        ids = torch.tensor([[int(token) for token in tokens[start : start + seq_len]]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss.item())
    return math.exp(sum(losses) / len(losses))
