"""How did the original compute S2-Attn? By rolling the sequence, so the shifted heads' first group wraps around.

As in the published LongLoRA and LongQLoRA code without flash attention. For comparison only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from component.attention.interface import UNLIMITED, TrainingMask


def rolled_attention(
    query: Tensor, key: Tensor, value: Tensor, group_size: int, *, scale: float | None = None
) -> Tensor:
    """query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D); T is a multiple of `group_size` tokens.

    The second half of the heads is rolled back by half a group before attention, and forward again after it.
    """
    batch, heads, length, _ = query.shape
    assert length % group_size == 0, f"{length} tokens are not a multiple of group_size {group_size}"
    query, key, value = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (query, key, value))

    def rolled(tensor: Tensor, by: int) -> Tensor:
        first, second = tensor.chunk(2, dim=1)
        return torch.cat([first, second.roll(by, dims=2)], dim=1)

    def grouped(tensor: Tensor) -> Tensor:  # (B, H, T, D) -> (B T/g, H, g, D)
        return tensor.unflatten(2, (-1, group_size)).transpose(1, 2).flatten(0, 1)

    query, key, value = (grouped(rolled(tensor, -group_size // 2)) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    out = out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    return rolled(out, group_size // 2).transpose(1, 2)


def rolled_shift_short(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention interface: rolled S2-Attn in training mode, stock SDPA otherwise.

    Also in the last steps with `full_attention_ratio`, where train.py sets an unlimited group size.
    """
    if not module.training or module.config.group_size == UNLIMITED:
        mask = attention_mask.full if isinstance(attention_mask, TrainingMask) else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)
    return rolled_attention(query, key, value, module.config.group_size, scale=scaling), None
