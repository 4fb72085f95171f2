"""What is the loss? Next-token cross-entropy, computed in chunks of tokens, so the full logits are never in memory.

For 8192 tokens, 32000 fp32 logits take 1 GiB and their gradient another. Here each chunk's gradient is computed right
after its loss, while its logits exist; only the gradient of the hidden states is kept.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from component.data import IGNORE_INDEX

TOKENS_PER_CHUNK = 1024


class ChunkedLoss(nn.Module):
    """Mixed into the class of a causal language model: in training with labels it returns the loss and no logits."""

    loss_chunk: int = TOKENS_PER_CHUNK

    def train(self, mode: bool = True):
        # the Trainer calls this before every step; traversing 2600 modules each time would idle the GPU for 20 ms
        return self if mode == self.training else super().train(mode)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,  # named here, since the Trainer drops columns that are not arguments
        *args,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs,
    ):
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        if args or labels is None or not self.training or not torch.is_grad_enabled():
            inputs = (input_ids, kwargs.pop("attention_mask"), kwargs.pop("position_ids"), *args)
            given = {} if labels is None else {"labels": labels, "shift_labels": shift_labels}
            return super().forward(*inputs, **kwargs, **given)
        items = kwargs.pop("num_items_in_batch", None)
        hidden = self.get_decoder()(input_ids=input_ids, **kwargs).last_hidden_state
        head = _inner(self.get_output_embeddings())
        return CausalLMOutputWithPast(loss=next_token_loss(hidden, shift_labels, head, items, self.loss_chunk))


class LossHead(nn.Module):
    """Mixed into the class of a head: given labels, it returns losses.

    In one call, whatever the number of chunks: at each call ZeRO-3 gathers the head's weight from all processes, whose
    rows differ in length.
    """

    def forward(
        self, hidden: Tensor, target: Tensor | None = None, chunk: int = TOKENS_PER_CHUNK, summed: bool = True
    ) -> Tensor:
        """(N, H) to the sum of the losses of `target`, (N,); (B, n, H) to those of each, (B, n), unless `summed`.

        Without `target` to logits, as the class it is mixed into.
        """
        if target is None:
            return super().forward(hidden)
        if summed:
            return _SummedLoss.apply(hidden, target, self.weight, self.bias, chunk)
        return _token_losses(super().forward, hidden, target, chunk)


def use_chunked_loss(model: PreTrainedModel, chunk: int) -> bool:
    """Mix `ChunkedLoss` into `model`; False if its logits are more than one linear layer of the hidden states."""
    if not use_loss_head(model):
        return False
    model.train()  # every module in one mode: from here on `train` relies on the model's own flag
    # keep the class name: the Trainer reads from it whether to shift labels, and saved configs contain it
    model.__class__ = type(type(model).__name__, (ChunkedLoss, type(model)), {})
    model.loss_chunk = chunk
    return True


def use_loss_head(model: PreTrainedModel) -> bool:
    """Mix `LossHead` into the head of `model`; False if its logits are more than one linear layer."""
    config, head = model.config, _inner(model.get_output_embeddings())
    is_scaled = any(
        getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )
    if is_scaled or not isinstance(head, nn.Linear):
        return False
    as_loss_head(head)
    return True


def as_loss_head(head: nn.Linear) -> None:
    if not isinstance(head, LossHead):
        head.__class__ = type(type(head).__name__, (LossHead, type(head)), {})


def next_token_loss(
    hidden: Tensor, shift_labels: Tensor, head: nn.Module, items: Tensor | int | None, chunk: int
) -> Tensor:
    """Mean loss in nats over the supervised tokens.

    Args:
        hidden: (B, T, H), the input of `head`, a `LossHead`.
        shift_labels: (B, T), the label of token t + 1 at position t; `IGNORE_INDEX` where there is none.
        items: number of labels in all micro-batches of the step, the divisor; None for the mean over this batch.
        chunk: tokens whose logits exist at the same time.
    """
    target = shift_labels.reshape(-1)
    count = (target != IGNORE_INDEX).sum().clamp(min=1) if items is None else items
    return head(hidden.reshape(-1, hidden.shape[-1]), target, chunk) / count


class _SummedLoss(torch.autograd.Function):
    """Sum over tokens of -log softmax(W h + b)[target], and its gradients, in one pass over chunks of tokens."""

    @staticmethod
    def forward(ctx, hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> Tensor:
        need_weight, need_bias = ctx.needs_input_grad[2], bias is not None and ctx.needs_input_grad[3]
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        w, b = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            loss, grad = _chunk(F.linear(hidden[part], w, b), target[part])
            total += loss
            # not divided by the number of tokens yet: in fp16 it would underflow before the loss scale is applied
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, w, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        scaled = [
            None if gradient is None else gradient.mul_(grad).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return scaled[0], None, scaled[1], scaled[2], None


def _chunk(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss, and d loss / d logits in fp32, of (n, V) logits; rows without a label contribute zero."""
    logits = logits.float()
    counts = (target != IGNORE_INDEX).unsqueeze(1)
    index = target.clamp(min=0).unsqueeze(1)
    log_sum = logits.logsumexp(1, keepdim=True)
    loss = ((log_sum - logits.gather(1, index)) * counts).sum()
    grad = logits.sub_(log_sum).exp_()
    grad.scatter_add_(1, index, torch.full_like(log_sum, -1.0)).mul_(counts)
    return loss, grad


def _inner(module: nn.Module) -> nn.Module:
    """The trained copy inside PEFT's `modules_to_save` wrapper, or the module itself."""
    return module.modules_to_save[module.active_adapters[0]] if hasattr(module, "modules_to_save") else module


def eval_chunk(chunk: int, rows: int) -> int:
    """Tokens of each of `rows` rows whose logits exist at the same time, so that all rows have about `chunk`."""
    return max(1, chunk // rows)


@torch.no_grad()
def next_token_losses(
    model: PreTrainedModel,
    input_ids: Tensor,
    chunk: int = TOKENS_PER_CHUNK,
    targets: Tensor | None = None,
    **inputs: Tensor,
) -> Tensor:
    """Loss in nats of each token but the first; logits exist for `chunk` tokens at a time.

    Args:
        model: a causal language model, with or without PEFT's wrapper.
        input_ids: (B, T), T at least 2.
        targets: (B, n), n at most T: the token to predict at each position; None: the next one of `input_ids`.
        inputs: attention_mask or position_ids, (B, T); the losses of padding are meaningless.

    Returns:
        (B, T - 1) or (B, n) in fp32; entry t is the loss of token t + 1, or of `targets`[:, t].
    """
    targets = input_ids[:, 1:] if targets is None else targets
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.get_decoder()(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
    hidden, head = hidden[:, : targets.shape[1]], _inner(base.get_output_embeddings())
    if isinstance(head, LossHead):
        return head(hidden, targets, chunk, summed=False)
    return _token_losses(partial(_logits, base), hidden, targets, chunk)


def _token_losses(logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    losses = [
        # flat, (tokens, V): a transposed (B, V, tokens) takes a hundred times as long on a GPU
        F.cross_entropy(logits(part).float().flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        for part, target in zip(hidden.split(chunk, 1), targets.split(chunk, 1), strict=True)
    ]
    return torch.cat(losses, dim=1)


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(B, T, V) in fp32 from (B, T, hidden size), with the scaling or softcapping of some architectures."""
    config = model.config
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # Cohere; Granite
    logits = model.get_output_embeddings()(hidden).float().mul_(scale)
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else cap * torch.tanh(logits / cap)
