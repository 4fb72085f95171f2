"""Two slow references: shift short attention as defined, which ours must equal, and the original's leaking version.

Both are registered with transformers (`shift_short_loop`, `shift_short_rolled`) for use in a model. Neither supports
a mask, so padding must be on the right.

Shapes: B batch, T tokens, H query heads, Hkv key/value heads, D head size, g group size in tokens.
"""

from functools import lru_cache

import torch
from torch import Tensor
from transformers import AttentionInterface

LOOP = "shift_short_loop"
ROLLED = "shift_short_rolled"


def is_shifted(head: int, heads: int, kv_heads: int) -> bool:
    """Whether a query head belongs to the half with groups shifted by g/2."""
    if kv_heads == 1:
        return head >= heads // 2
    kv_head = head // (heads // kv_heads)
    return kv_head >= kv_heads // 2


def keys_seen(token: int, document_starts: tuple[int, ...], group_size: int, shifted: bool) -> range:
    """The tokens that `token` attends to: those of its document and its group, up to itself."""
    document = max(start for start in document_starts if start <= token)
    place = token - document
    first = 0  # of the group, counted from the start of the document
    following = group_size // 2 if shifted else group_size
    while following <= place:
        first, following = following, following + group_size
    return range(document + first, token + 1)


@lru_cache(maxsize=4096)
def seen(length: int, document_starts: tuple[int, ...], group_size: int, shifted: bool) -> Tensor:
    """(T, T), True where the row's token attends to the column's."""
    table = torch.zeros(length, length, dtype=torch.bool)
    for token in range(length):
        keys = keys_seen(token, document_starts, group_size, shifted)
        table[token, keys.start : keys.stop] = True
    return table


def shift_short_loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_size: int,
    position_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D), by an explicit mask per head.

    `position_ids` (B, T) or (1, T): a document starts at each 0.
    """
    rows, heads, length, head_size = query.shape
    kv_heads = key.shape[1]
    positions = [list(range(length))] if position_ids is None else position_ids.tolist()
    tables = []
    for row in range(rows):
        of_row = positions[row if len(positions) > 1 else 0]
        starts = tuple(token for token in range(length) if token == 0 or of_row[token] == 0)
        tables += [seen(length, starts, group_size, is_shifted(head, heads, kv_heads)) for head in range(heads)]
    visible = torch.stack(tables).view(rows, heads, length, length).to(query.device)

    key_of_head = key[:, [head // (heads // kv_heads) for head in range(heads)]]
    value_of_head = value[:, [head // (heads // kv_heads) for head in range(heads)]]
    scores = query @ key_of_head.transpose(2, 3) * (head_size**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return (weights @ value_of_head).transpose(1, 2)


def shift_short_rolled(
    query: Tensor, key: Tensor, value: Tensor, group_size: int, scale: float | None = None
) -> Tensor:
    """Query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D), as LongLoRA's and LongQLoRA's non-flash code.

    Shows why ours differs: the second half of the heads is rolled by -g/2 along the sequence, so its last group is
    [last g/2 tokens, first g/2 tokens]. The beginning of a text attends to its end, and over the layers information
    about the next tokens leaks into every position. T must be a multiple of g.
    """
    rows, heads, length, head_size = query.shape
    per_kv = heads // key.shape[1]

    def shift(tensor: Tensor) -> Tensor:  # (B, H, T, D) -> (B*T/g, H, g, D)
        tensor = torch.cat((tensor[:, : heads // 2], tensor[:, heads // 2 :].roll(-(group_size // 2), dims=2)), dim=1)
        tensor = tensor.transpose(1, 2).reshape(rows * (length // group_size), group_size, heads, head_size)
        return tensor.transpose(1, 2)

    query, key, value = (
        shift(tensor) for tensor in (query, key.repeat_interleave(per_kv, 1), value.repeat_interleave(per_kv, 1))
    )
    scores = query @ key.transpose(2, 3) * (head_size**-0.5 if scale is None else scale)
    future = torch.ones(group_size, group_size, dtype=torch.bool, device=query.device).triu(1)
    output = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ value
    output = output.transpose(1, 2).reshape(rows, length, heads, head_size)
    return torch.cat((output[:, :, : heads // 2], output[:, :, heads // 2 :].roll(group_size // 2, dims=1)), dim=2)


def loop_attention_forward(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, position_ids=None, **kwargs
):
    assert module.training
    assert not dropout
    return shift_short_loop(query, key, value, module.config.group_size, position_ids, scaling), None


def rolled_attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    assert module.training
    assert not dropout
    return shift_short_rolled(query, key, value, module.config.group_size, scaling), None


AttentionInterface.register(LOOP, loop_attention_forward)
AttentionInterface.register(ROLLED, rolled_attention_forward)
