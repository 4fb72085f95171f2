"""Which shapes have the models whose speed and memory are measured? And tiny ones for tests."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    family: str = "llama"  # transformers' model type; qwen2 has biases on q, k and v
    context: int = 4096  # tokens, before extension
    epsilon: float = 1e-5  # of the norms
    tied: bool = False  # lm_head is the embedding
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})

    @property
    def weights(self) -> int:
        """Of the linear layers in all decoder layers."""
        keys = self.hidden // self.heads * self.kv_heads
        return self.layers * (2 * self.hidden * (self.hidden + keys) + 3 * self.hidden * self.mlp)


LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "7b": Shape(4096, 11008, 32, 32, 32),
    "13b": Shape(5120, 13824, 40, 40, 40),
    "llama3-8b": Shape(
        *(4096, 14336, 32, 32, 8, 128256), context=8192, rope={"rope_type": "default", "rope_theta": 500000.0}
    ),
    "llama3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256, context=131072, rope=LLAMA_3_1),
    "qwen2.5-7b": Shape(
        *(3584, 18944, 28, 28, 4, 152064, "qwen2", 131072, 1e-6), rope={"rope_type": "default", "rope_theta": 1e6}
    ),
    "mistral-7b": Shape(
        *(4096, 14336, 32, 32, 8, 32768, "mistral", 32768), rope={"rope_type": "default", "rope_theta": 1e6}
    ),
    "tiny": Shape(64, 128, 2, 4, 4),
    "tiny-qwen2": Shape(64, 128, 2, 4, 2, 40000, "qwen2"),
}
