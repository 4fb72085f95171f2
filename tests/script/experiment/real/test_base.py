"""SmolLM2's base: names and the order of rows. The file itself is 98 MB and not at hand."""

import hashlib

import numpy as np
import pytest
import torch

from script.experiment.real.base import SHA256, config, halves_of_heads, name_of


@pytest.mark.parametrize(
    ("gguf", "ours"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.7.attn_q.weight", "model.layers.7.self_attn.q_proj.weight"),
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_names(gguf, ours):
    assert name_of(gguf) == ours


def test_rows_go_back_into_halves():
    """Two heads of six numbers: GGUF's 0 1 2 3 4 5 are Hugging Face's 0 3 1 4 2 5, the pairs of its rotation."""
    order = halves_of_heads(np.arange(12.0)[:, None], 2)[:, 0].tolist()
    assert order == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_rotations_of_pairs_and_of_halves_agree():
    """Scores of a query and a key at a distance, whichever way a rotation takes its pairs."""
    draw = np.random.default_rng(0)
    angles = 3 * 10000.0 ** (-np.arange(3) / 3)

    def rotate(vector: np.ndarray, first: slice, second: slice) -> np.ndarray:
        out = vector.copy()
        out[first] = vector[first] * np.cos(angles) - vector[second] * np.sin(angles)
        out[second] = vector[second] * np.cos(angles) + vector[first] * np.sin(angles)
        return out

    query, key = draw.normal(size=(2, 6))
    pairs = rotate(query, slice(0, None, 2), slice(1, None, 2)) @ key
    query, key = (halves_of_heads(vector[:, None], 1)[:, 0] for vector in (query, key))
    assert rotate(query, slice(0, 3), slice(3, 6)) @ key == pytest.approx(pairs)


def test_the_model():
    with torch.device("meta"):
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert len(SHA256) == len(hashlib.sha256().hexdigest())
