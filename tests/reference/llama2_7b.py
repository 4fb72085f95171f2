"""The workload of LLaMA2-7B with 8192 tokens and LoRA of rank 64 on all seven linear layers."""

from component.memory.workload import Workload

HIDDEN, MLP, DEPTH, VOCABULARY, RANK = 4096, 11008, 32, 32000, 64
LINEAR = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP  # q, k, v, o; gate, up, down: 202,375,168
LORA = RANK * (4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + MLP))  # A and B of each: 4,997,120
LLAMA2_7B = Workload(
    hidden=HIDDEN,
    mlp=MLP,
    layers=DEPTH,
    heads=32,
    kv_heads=32,
    head_size=128,
    vocabulary=VOCABULARY,
    weights=DEPTH * LINEAR,
    embeddings=2 * VOCABULARY * HIDDEN,
    rank=RANK,
    trained=DEPTH * LORA,
    tokens=8192,
    group=2048,
)
