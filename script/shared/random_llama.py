"""How is a random-weight model of LLaMA2's shape created, to measure memory and speed?"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from script.shared.shape import SHAPES


def make_model(size: str, tokenizer: str, folder: Path) -> None:
    """Write an fp16 model and the tokenizer to `folder`."""
    hidden, mlp, layers, heads = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        dtype="float16",
    )
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
