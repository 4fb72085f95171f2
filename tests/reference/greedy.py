"""Text continued by Hugging Face alone: what ours must equal."""

import torch


def stock(model, prompt_ids: list[int], **kwargs) -> list[int]:
    """Greedy, by Hugging Face alone."""
    ids = torch.tensor([prompt_ids])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=1, eos_token_id=1, **kwargs
    )
    return out[0, len(prompt_ids) :].tolist()
