"""What is kept, recomputed or moved to the host?

Activations between decoder layers are recomputed by Hugging Face's gradient checkpointing (`gradient_checkpointing:
true`). Here: the cap on GPU memory, and next-token losses without the logits of a whole window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from component.error import UserError

TOKENS_PER_CHUNK = 1024  # 32000 logits in fp32 for each: 125 MiB at a time instead of 1 GiB for 8192 tokens


def limit_memory(budget_gib: float | None) -> None:
    """Make the GPU as small as `budget_gib` GiB for this process: allocations beyond fail as on such a card.

    Raises:
        UserError: there is no GPU, or it is smaller than that.
    """
    if budget_gib is None:
        return
    if not torch.cuda.is_available():
        raise UserError(f"memory_budget_gib: {budget_gib} GiB, but there is no GPU whose memory it could limit")
    total = torch.cuda.mem_get_info()[1]
    if budget_gib * 2**30 > total:
        raise UserError(f"memory_budget_gib: {budget_gib} GiB, but this GPU has {total / 2**30:.1f}")
    torch.cuda.set_per_process_memory_fraction(budget_gib * 2**30 / total)


@torch.no_grad()
def next_token_losses(model: PreTrainedModel, input_ids: Tensor, chunk: int = TOKENS_PER_CHUNK) -> Tensor:
    """Loss in nats of each token but the first, given those before it; logits exist for `chunk` tokens at a time.

    Args:
        model: a causal language model, PEFT's wrapper around it or not.
        input_ids: (B, T), T at least 2, without padding.

    Returns:
        (B, T - 1) in fp32; entry t is the loss of token t + 1.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    losses = [
        F.cross_entropy(_logits(base, part).transpose(1, 2), target, reduction="none")
        for part, target in zip(hidden[:, :-1].split(chunk, 1), input_ids[:, 1:].split(chunk, 1), strict=True)
    ]
    return torch.cat(losses, dim=1)


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(B, T, V) in fp32 from (B, T, hidden size), scaled and capped as some Llama relatives do."""
    config = model.config
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # Cohere; Granite
    logits = model.get_output_embeddings()(hidden).float().mul_(scale)
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else cap * torch.tanh(logits / cap)


def peak_memory() -> dict[str, float]:
    """What this process took of the GPU at most so far, in GiB: by tensors, and held by PyTorch's allocator."""
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }
