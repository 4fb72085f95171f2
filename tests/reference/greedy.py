"""Greedy decoding by Hugging Face alone, the reference for ours."""

import torch


def stock(model, prompt_ids: list[int], **kwargs) -> list[int]:
    """The ids of the continuation."""
    ids = torch.tensor([prompt_ids])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=1, eos_token_id=1, **kwargs
    )
    return out[0, len(prompt_ids) :].tolist()
