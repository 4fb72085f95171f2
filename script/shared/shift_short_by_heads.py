"""How would S2-Attn over several GPUs work by heads, as DeepSpeed Ulysses does full attention?

Every key, value, query and output goes to another process and back, where component/attention/exchange.py sends half a
group of keys and values. For comparison only.

Shapes: B rows, P processes, m tokens per process, T = P m, H query heads, Hkv key/value heads, D head size.
"""

from torch import Tensor

from component.attention import interface, shift_short
from component.attention.shift_short import attend_in_groups
from component.attention.ulysses import heads_to_tokens, tokens_to_heads
from component.distributed.sequence import SequenceGroup


def attend_by_heads(
    query, key, value, group_size, documents, scale, dropout, saved_attention, *, sequence: SequenceGroup
) -> Tensor:
    """`attend_across_processes`, (B, H, m, D) and (B, Hkv, m, D) -> (B, m, H, D); an even P divides H and Hkv.

    The first half of the processes gets unshifted heads, the other shifted ones.
    """
    query, key, value = (tokens_to_heads(tensor, sequence) for tensor in (query, key, value))
    is_shifted = sequence.rank >= sequence.size // 2

    def one_half(heads: int, kv_heads: int, documents, group_size: int) -> list[shift_short._Half]:
        return [shift_short._Half(slice(0, heads), slice(0, kv_heads), group_size // 2 if is_shifted else 0)]

    both_halves, shift_short._halves = shift_short._halves, one_half
    try:
        out = attend_in_groups(query, key, value, group_size, documents, scale, dropout, saved_attention)
    finally:
        shift_short._halves = both_halves
    return heads_to_tokens(out, sequence)


def use_heads() -> None:
    """Make transformers' attention interface split S2-Attn by heads."""
    interface.attend_across_processes = attend_by_heads
