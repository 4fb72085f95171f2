"""How do new tokens attend to a long cache? Part by part, merged by their log-sum-exps.

Registered with transformers as attention and mask function NAME. Without padding it needs no mask: stock SDPA would be
given one of new tokens x all tokens, and with a mask PyTorch has neither the flash nor the cuDNN kernel. Keys and
values in blocks (component/inference/quantized_layer.py) are dequantized a segment at a time; for one new token, a
Triton kernel reads them as they are stored.

Shapes: B rows, H query heads, K key/value heads, t new tokens, T tokens, D head size.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from component.attention.interface import has_plain_attention
from component.attention.kernel import SavedForBackward, attention_forward, merge_attention
from component.inference.quantized_layer import History

NAME = "cached_blocks"
OLDEST = (8, 0)  # compute capability: older GPUs are not supported by Triton, or slow with it
HAS_TRITON = importlib.util.find_spec("triton") is not None


def supports_blocks(config: PretrainedConfig, tokens: int) -> bool:
    """Whether NAME computes what the model's own attention over `tokens` tokens does."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return has_plain_attention(config, tokens) and head_size % 8 == 0  # fused kernels need a multiple of 8


def block_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """transformers' mask interface: no mask without padding, else stock SDPA's."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)


def block_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, t, D) -> (B, t, H, D).

    `key` and `value` are those of all tokens, or those of the new ones if `key.history` has the others.
    """
    history: History | None = getattr(key, "history", None)
    new, old = query.shape[2], key.shape[2] - query.shape[2]
    if history is None and (attention_mask is not None or old == 0 or new == 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert attention_mask is None, "padding: blocks are for rows of equal length"
    if history is not None and history.blocks and runs_kernel(query, history):
        return decoded(query, history, scaling or query.shape[3] ** -0.5).transpose(1, 2), None
    parts = []
    if history is None:
        parts = [(key[:, :, :old], value[:, :, :old])]
    elif new == 1:  # few tokens: one call for all
        key, value = torch.cat([history.keys, key], 2), torch.cat([history.values, value], 2)
    elif history.keys.shape[2]:
        parts = [(history.keys, history.values)]
    newest = slice(-new, None) if history is None else slice(None)
    out, saved = attention_forward(query, key[:, :, newest], value[:, :, newest], scaling, is_causal=new > 1)
    out = out.float()  # it is rounded once, not at each merge
    for part in parts:
        merge_attention(out, saved, *attention_forward(query, *part, scaling, is_causal=False))
    if history is not None and history.blocks:
        merge_blocks(out, saved, query, history, scaling)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def merge_blocks(out: Tensor, saved: SavedForBackward, query: Tensor, history: History, scaling: float | None) -> None:
    """Merge attention to the quantized blocks into `out` (B, H, t, D) fp32 and its log-sum-exp."""
    for segment, blocks in enumerate(history.segments()):
        part = history.dequantized(segment, blocks)
        merge_attention(out, saved, *attention_forward(query, *part, scaling, is_causal=False))


def runs_kernel(query: Tensor, history: History) -> bool:
    """Whether component/inference/decode_kernel.py does this: one token, integers, a GPU that Triton supports."""
    stored, head_size = history.layer.stores[0].format, query.shape[3]
    if query.shape[2] != 1 or not stored.has_zero or head_size & (head_size - 1):  # its ranges are powers of two
        return False
    return query.is_cuda and torch.cuda.get_device_capability(query.device) >= OLDEST and HAS_TRITON


def decoded(query: Tensor, history: History, scaling: float) -> Tensor:
    """Attention of one token (B, H, 1, D) to all tokens up to itself, which the cache holds already."""
    from component.inference.decode_kernel import decode_attention, split_table

    layer, (keys, values) = history.layer, history.layer.stores
    if layer.table_blocks != history.blocks:  # once in BLOCK tokens
        segments = list(zip(keys.segments, values.segments, history.segments(), strict=False))  # the last may be newer
        layer.table, layer.table_blocks = split_table(segments), history.blocks
    recent = [memory.flatten(0, 1) for memory in layer.recent]
    grouped = query.reshape(len(recent[0]), -1, query.shape[3])  # (B K, H / K, D)
    merged = decode_attention(
        grouped,
        (recent[0], recent[1]),
        history.keys.shape[2] + 1,
        layer.table,
        bits=keys.format.bits,
        value_groups=values.segments[0].scale.shape[3],
        scaling=scaling,
    )
    return merged.view(query.shape)


AttentionInterface.register(NAME, block_attention_forward)
AttentionMaskInterface.register(NAME, block_mask)
