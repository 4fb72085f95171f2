"""train.py with the original's S2-Attn, which rolls the sequence: what half of the heads see wraps around.

python script/experiment/train_rolled.py --train_args_file FILE.yaml

For comparison only: while training with it, tokens learn of what comes after them (script/experiment/README.md).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import train
from component.attention.interface import NAME, TrainingMask


def rolled_attention(
    query: Tensor, key: Tensor, value: Tensor, group_size: int, *, scale: float | None = None
) -> Tensor:
    """(B, H, T, D), (B, Hkv, T, D) twice -> (B, T, H, D): the second half of the heads rolled back by half a group.

    As the published code does it (LongLoRA's and LongQLoRA's forward without flash attention), and by SDPA.
    """
    batch, heads, length, _ = query.shape
    assert length % group_size == 0, f"rows of {length} tokens are no whole number of groups of {group_size}"
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
    """transformers' attention interface: rolled while `module` trains, stock SDPA otherwise."""
    if not module.training:
        mask = attention_mask.full if isinstance(attention_mask, TrainingMask) else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)
    return rolled_attention(query, key, value, module.config.group_size, scale=scaling), None


if __name__ == "__main__":
    AttentionInterface.register(NAME, rolled_shift_short)
    train.main()
