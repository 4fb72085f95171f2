"""Tiny models of each family with nonzero LoRA, and their losses and gradients.

The plain path, Hugging Face's layers and loss with PEFT's LoRA, is the reference for memory plans.
"""

import copy
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from component.adapter import add_adapter
from component.attention.interface import use_shift_short_attention
from component.memory.apply import use_memory_plan
from component.memory.plan import MemoryPlan
from component.model import load_base

FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
VOCABULARY = 96
TOKENS = 53  # a prime, so no multiple of a tile, chunk or group
GROUP = 12
LAYERS = 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def tiny_config(family: str = "llama", *, s2: bool = True, **changes):
    config = FAMILIES[family](**{**SIZES, **changes})
    if s2:
        use_shift_short_attention(config, GROUP)
    return config


def tiny_base(config) -> PreTrainedModel:
    """The same weights every time; biases and norms are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config)
        add_noise(model, "bias", "norm")
    return model


@torch.no_grad()
def add_noise(model: nn.Module, *parts: str, std: float = 0.1) -> None:
    """Add noise to the parameters with one of `parts` in their name."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts):
            parameter.add_(torch.randn(parameter.shape) * std)


def with_lora(model: PreTrainedModel, *, dropout: float = 0.0, **options) -> PeftModel:
    """Add LoRA with nonzero B; with B = 0, A would get no gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        adapted = add_adapter(model, rank=4, alpha=6, dropout=dropout, **options)
        add_noise(adapted, "lora_B")
    return adapted


def tiny_model(family: str = "llama", *, s2: bool = True, changes: dict | None = None, **options) -> PeftModel:
    return with_lora(tiny_base(tiny_config(family, s2=s2, **(changes or {}))), **options)


def tiny_nf4_model(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    """`tiny_model` with an NF4 base, loaded from `folder` as in training."""
    tiny_base(tiny_config(family, s2=False)).save_pretrained(folder)
    base = load_base(str(folder), tiny_config(family), dtype=dtype, load_in_4bit=True, device="cpu")
    return with_lora(base, **options)


def under_plan(
    model: PeftModel, *, in_float8: bool = False, float8_forward: bool = True, fused: bool = False, **memory_options
) -> PeftModel:
    """A copy of `model` under the plan with these memory options."""
    lean, float8 = copy.deepcopy(model), {"in_float8": in_float8, "float8_forward": float8_forward}
    assert use_memory_plan(lean, plan_of(**memory_options), fused=fused, **float8) is None
    return lean


def plan_of(**memory_options) -> MemoryPlan:
    """A plan with full activation checkpointing and no tiling, except for these memory options."""
    defaults = {
        "keep_layers": 0,
        "keep_attention_layers": 0,
        "keep_attention_output": False,
        "offload_activations": False,
        "mlp_tile_tokens": 0,
        "loss_chunk_tokens": 4096,
    }
    return MemoryPlan(**{**defaults, **memory_options})


def random_batch(rows: int = 1, tokens: int = TOKENS, seed: int = 3) -> dict[str, Tensor]:
    """Rows of random tokens; the first five of each have no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels}


def train_pass(model: nn.Module, *batches: dict, seed: int = 4) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of `batches` and their summed gradients by name, with RNG seed `seed`."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    return losses, gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, of all trainable parameters; asserts that frozen ones have none."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.dtype == parameter.dtype, name
            found[name] = parameter.grad.clone()
        else:
            assert parameter.grad is None, f"{name} is frozen"
    return found


def assert_same(ours: tuple, theirs: tuple, tolerance: float = 1e-5) -> None:
    """Compare (losses, gradients); `tolerance` is relative to each gradient's largest absolute value."""
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=tolerance, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        largest = float(expected.abs().max())
        assert largest > 0, f"{name} is zero"
        error = float((ours[1][name] - expected).abs().max()) / largest
        assert error <= tolerance, f"{name}: off by {error:.2e} of its largest gradient"


def differs(ours: tuple, theirs: tuple, by: float = 1e-2) -> bool:
    """Whether some gradient differs by more than `by` of its largest absolute value."""
    return any(float((ours[1][n] - g).abs().max()) > by * float(g.abs().max()) for n, g in theirs[1].items())
