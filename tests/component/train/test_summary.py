"""The summary that a run prints before its first step."""

from component.adapter import add_adapter
from component.train.summary import aligned, describe_trainable


def test_summary_is_aligned():
    assert aligned({"model": "a base", "context": "64 -> 128"}) == "  model    a base\n  context  64 -> 128"


def test_describe_trainable(tiny_llama):
    model = add_adapter(tiny_llama, rank=4, alpha=16, dropout=0.0, train_embedding=True, train_norm=True)
    assert describe_trainable(model) == "28,832 parameters (LoRA 4,096, embeddings 24,576, norms 160)"
