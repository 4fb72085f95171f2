"""How is a random-weight model of a known shape created, to measure memory and speed?"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from script.shared.shape import SHAPES, Shape


def config_of(shape: Shape) -> PretrainedConfig:
    """As the family's published models have it; none slides a window."""
    return AutoConfig.for_model(
        shape.family,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.epsilon,
        tie_word_embeddings=shape.tied,
        rope_parameters=dict(shape.rope),
        **({"sliding_window": None} if shape.family == "mistral" else {}),
        dtype="float16",
    )


def make_model(size: str, tokenizer: str, folder: Path) -> None:
    """Write an fp16 model and `tokenizer` to `folder`; its vocabulary may be smaller than the model's."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config_of(SHAPES[size]))
    model.save_pretrained(folder, max_shard_size="4GB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
