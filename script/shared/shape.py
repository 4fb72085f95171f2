"""What are LLaMA2's shapes, and a tiny one for tests?"""

SHAPES = {  # hidden size, MLP size, layers, heads
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "tiny": (64, 128, 2, 4),
}
