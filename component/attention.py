"""Which tokens does a token see while training? Shift short attention, S2-Attn (LongLoRA, arXiv 2309.12307, 3.2).

The first half of the heads attends causally inside groups [0,g) [g,2g) ..., the second half inside groups moved by
half a group: [0,g/2) [g/2,3g/2) ... Deviation from the published code: there the second half is *rolled*, so that the
first half-group shares a group with the end of the text and, through the layers, every token learns of later ones.
Here nothing wraps around; the first and the last half-group stand alone.

It is a registered attention of transformers (`config._attn_implementation = "shift_short"`) and acts in training mode
only: evaluating modules call stock SDPA with the mask that stock SDPA would have got.

Shapes: B batch, T tokens, H query heads, Hkv key/value heads, D head size, g group size in tokens.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from component.error import UserError

NAME = "shift_short"


def shift_short_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_size: int,
    position_ids: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention inside groups, the second half of the heads in groups moved by half a group.

    The unshifted heads are those of the first floor(Hkv/2) key/value heads; with a single key/value head, the first
    floor(H/2) query heads. Keys and values are never repeated for grouped-query models.

    Args:
        query: (B, H, T, D), after rotary embedding.
        key: (B, Hkv, T, D), after rotary embedding; H is a multiple of Hkv.
        value: (B, Hkv, T, D).
        group_size: g in tokens, even and at least 2. T is any length; up to g/2 it is plain causal attention.
        position_ids: (B, T), or (1, T) for all rows alike. Where a position is 0 a packed document starts: its groups
            start there too, and no token sees another document. None: each row is one document.
        scale: of the scores before the softmax; D ** -0.5 if None.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, T, H, D).

    Raises:
        UserError: g is odd or below 2.
    """
    check_group_size(group_size)
    documents = document_spans(position_ids) if position_ids is not None else None
    return _attend_documents(query, key, value, group_size, documents, scale=scale, dropout=dropout)


def check_group_size(group_size: int) -> None:
    if group_size < 2 or group_size % 2:
        raise UserError(f"group_size: {group_size} tokens; groups move by half of that: use an even number >= 2")


def document_spans(position_ids: Tensor) -> list[list[tuple[int, int]]] | None:
    """[start, end) of each document in each row of `position_ids` (B, T); None if every row is one document.

    Reads the positions back to the host: call it once per forward pass, not once per layer.
    """
    starts_document = position_ids == 0
    starts_document[:, 0] = True
    length = position_ids.shape[1]
    starts = [row.nonzero().flatten().tolist() for row in starts_document.cpu()]
    if all(len(row) == 1 for row in starts):
        return None
    return [list(zip(row, [*row[1:], length], strict=True)) for row in starts]


def _attend_documents(query, key, value, group_size, documents, *, scale, dropout) -> Tensor:
    """Each document by itself; `documents` as from `document_spans`, one list per row or one for all rows alike."""
    options = {"scale": scale, "dropout": dropout}
    if documents is None:
        return _attend_document(query, key, value, group_size, **options)
    rows = [slice(None)] if len(documents) == 1 else [slice(row, row + 1) for row in range(len(query))]
    outputs = []
    for row, spans in zip(rows, documents, strict=True):
        parts = []
        for start, end in spans:
            q, k, v = (tensor[row, :, start:end] for tensor in (query, key, value))
            parts.append(_attend_document(q, k, v, group_size, **options))
        outputs.append(torch.cat(parts, dim=1))
    return torch.cat(outputs)


def _attend_document(query, key, value, group_size, *, scale, dropout) -> Tensor:
    """(B, T, H, D): both halves of the heads over rows that are one document each."""
    heads, kv_heads = query.shape[1], key.shape[1]
    plain_kv = kv_heads // 2
    plain = plain_kv * (heads // kv_heads) if kv_heads > 1 else heads // 2
    options = {"group_size": group_size, "scale": scale, "dropout": dropout}
    if plain == 0:  # a single query head: it is of the shifted half
        return _attend_groups(query, key, value, group_size // 2, **options)
    if kv_heads == 1:
        first_kv = last_kv = slice(0, 1)
    else:
        first_kv, last_kv = slice(0, plain_kv), slice(plain_kv, kv_heads)
    return torch.cat(
        [
            _attend_groups(query[:, :plain], key[:, first_kv], value[:, first_kv], group_size, **options),
            _attend_groups(query[:, plain:], key[:, last_kv], value[:, last_kv], group_size // 2, **options),
        ],
        dim=2,
    )


def _attend_groups(query, key, value, first_group, *, group_size, scale, dropout) -> Tensor:
    """(B, T, h, D): causal attention inside [0, first_group), then groups of `group_size`, then what is left."""
    length = query.shape[2]
    head = min(first_group, length) if first_group < group_size else 0
    whole = (length - head) // group_size
    tail = head + whole * group_size

    def attend(start: int, end: int, groups: int) -> Tensor:
        # groups of equal length as a batch of their own: (B, h, n*g, D) -> (B*n, h, g, D), a view for B = 1
        q, k, v = (
            tensor[:, :, start:end].unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)
            for tensor in (query, key, value)
        )
        out = _causal(q, k, v, scale, dropout).transpose(1, 2)
        return out.reshape(len(query), end - start, *out.shape[2:])

    spans = [(0, head, 1), (head, tail, whole), (tail, length, 1)]
    parts = [attend(start, end, groups) for start, end, groups in spans if start < end]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Causal attention on PyTorch's kernels, (b, h, t, D): grouped heads without repeating keys and values."""
    attend = F.scaled_dot_product_attention
    options: dict[str, Any] = {"is_causal": True, "scale": scale, "dropout_p": dropout}
    per_kv = query.shape[1] // key.shape[1]
    if per_kv == 1 or _kernels_know_grouped_heads(query):
        return attend(query, key, value, enable_gqa=per_kv > 1, **options)
    # The memory-efficient kernel knows no grouped heads: one call for each member of a group
    members = query.unflatten(1, (key.shape[1], per_kv)).unbind(2)
    return torch.stack([attend(member, key, value, **options) for member in members], dim=2).flatten(1, 2)


def _kernels_know_grouped_heads(query: Tensor) -> bool:
    """Whether SDPA's choice for this tensor is flash or cuDNN (or the CPU's flash), which take grouped heads."""
    if not query.is_cuda:
        return query.device.type == "cpu"
    flash = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.cudnn_sdp_enabled()
    return flash and query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def limit_kernels(use_flash_attn: bool | None) -> None:
    """Let SDPA choose among all kernels (None), flash and cuDNN alone (True), or all but those (False: a V100)."""
    if use_flash_attn is not None:
        torch.backends.cuda.enable_flash_sdp(use_flash_attn)
        torch.backends.cuda.enable_cudnn_sdp(use_flash_attn)
        torch.backends.cuda.enable_mem_efficient_sdp(not use_flash_attn)
        torch.backends.cuda.enable_math_sdp(not use_flash_attn)


def describe_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """The SDPA kernels that may run on `device` for `dtype`, in the order in which PyTorch prefers them."""
    if device.type != "cuda":
        return "SDPA: CPU flash"
    half, backends = dtype != torch.float32, torch.backends.cuda
    fast = half and torch.cuda.get_device_capability(device) >= (8, 0)
    kernels = {
        "cuDNN": fast and backends.cudnn_sdp_enabled(),
        "flash": fast and backends.flash_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
    }
    return "SDPA: " + ", ".join(name for name, runs in kernels.items() if runs)


class TrainingMask:
    """What one forward pass over whole sequences knows about its mask, shared by all layers.

    The mask is built before any layer has said whether it trains: a training layer reads padding and documents, an
    evaluating one asks for the tensor (B, 1, T, T) that stock SDPA would have got.
    """

    def __init__(self, padding: Tensor | None, build_full: Callable[[], Tensor | None]):
        self.padding = padding  # (B, T) bool, False where a token is padding
        self._build_full = build_full
        self._documents: list | None = None
        self._documents_known = False

    @cached_property
    def full(self) -> Tensor | None:
        return self._build_full()

    def contiguous(self) -> Tensor | None:
        """`generate` asks its prepared masks for this; whoever generates wants the full one."""
        return self.full

    @cached_property
    def is_right_padded(self) -> bool:
        """True if no real token follows a padding token."""
        return self.padding is None or not bool((self.padding[:, 1:] & ~self.padding[:, :-1]).any())

    def documents(self, position_ids: Tensor | None) -> list | None:
        if not self._documents_known and position_ids is not None:
            self._documents, self._documents_known = document_spans(position_ids), True
        return self._documents


def shift_short_mask(
    batch_size: int, q_length: int, kv_length: int, *args, attention_mask: Tensor | None = None, **kwargs
):
    """transformers' mask interface: a `TrainingMask` for whole sequences, stock SDPA's mask while decoding."""

    def build_full() -> Tensor | None:
        return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)

    if q_length != kv_length:  # a cache is in use: nobody trains
        return build_full()
    return TrainingMask(attention_mask, build_full)


def shift_short_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TrainingMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: S2 while `module` trains, stock SDPA otherwise.

    Raises:
        UserError: training with left padding, holes in the mask, a custom mask, a key-value cache or capped scores.
    """
    if not module.training:
        mask = attention_mask.full if isinstance(attention_mask, TrainingMask) else attention_mask
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, position_ids=position_ids, **kwargs
        )
    if isinstance(attention_mask, Tensor) or query.shape[2] != key.shape[2]:
        raise UserError(
            "attention_mask: shift short attention trains on whole rows, without a key-value cache and without a "
            "custom mask; pass (batch, tokens) masks, or set use_shift_short_attention: false"
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UserError(
            f"use_shift_short_attention: {type(module).__name__} caps its scores or adds sinks to them, which shift "
            "short attention does not; set it to false"
        )
    documents = None
    if attention_mask is not None:
        if not attention_mask.is_right_padded:
            raise UserError(
                "attention_mask: left padding or holes; groups are counted from the first token, so training with "
                "shift short attention needs right padding (padding_side='right')"
            )
        documents = attention_mask.documents(position_ids)
    out = _attend_documents(query, key, value, module.config.group_size, documents, scale=scaling, dropout=dropout)
    return out, None


def use_shift_short_attention(config: PretrainedConfig, group_size: int) -> None:
    """Select S2 with groups of `group_size` tokens for the model that is built from `config`.

    Raises:
        UserError: an odd or too small group, or a model whose sliding window is shorter than a group.
    """
    check_group_size(group_size)
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < group_size:
        raise UserError(
            f"group_size: {group_size} tokens, but the model's own sliding window is {window}; "
            f"use an even group_size of at most {window}"
        )
    config.group_size = group_size
    config._attn_implementation = NAME


AttentionInterface.register(NAME, shift_short_attention_forward)
AttentionMaskInterface.register(NAME, shift_short_mask)
