"""Memory plans on a GPU: bf16 and fp16 with Liger's kernels, pinned CPU memory, no growth over steps."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from component.adapter import add_adapter
from component.attention.interface import use_shift_short_attention
from component.memory.apply import liger_runs, use_memory_plan
from component.memory.plan import MemoryPlan

pytestmark = pytest.mark.gpu
PLANS = {
    "everything": MemoryPlan(4, 0, False, False, 0, 1024),
    "attention": MemoryPlan(0, 4, False, False, 0, 64),
    "nothing": MemoryPlan(0, 0, False, False, 0, 64),
    "all options": MemoryPlan(1, 1, True, True, 96, 64),
    "offloaded": MemoryPlan(0, 0, True, True, 96, 64),
    "no prefetch": MemoryPlan(0, 0, False, True, 96, 64, fetch_ahead=False),
}


@pytest.fixture
def build(tiny_llama_config):
    def model(dtype, plan=None, fused=False, **adapter):
        torch.manual_seed(1)
        config = copy.deepcopy(tiny_llama_config)
        config.num_hidden_layers, config.hidden_size, config.intermediate_size = 4, 256, 512
        config.head_dim, config.use_cache = config.hidden_size // config.num_attention_heads, False
        use_shift_short_attention(config, 128)
        adapted = add_adapter(LlamaForCausalLM(config), rank=8, alpha=16, dropout=0.0, **adapter)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        adapted = adapted.to("cuda", dtype).train()
        if plan is not None:
            assert use_memory_plan(adapted, plan, fused=fused) is None
        return adapted

    return model


def gradients(model) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and all gradients by name, in fp32."""
    torch.manual_seed(2)
    ids = torch.randint(0, model.config.vocab_size, (2, 515), device="cuda")
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 400:], labels[1, 400:] = 0, -100
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=913).loss
    loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


def worst(found: dict, truth: dict) -> float:
    return max(float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth)


@pytest.mark.parametrize("full", [{}, {"train_embedding": True, "train_norm": True}], ids=["LoRA", "full"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_that_of_the_plain_path(build, dtype, plan, full):
    """The error relative to fp32 is at most 1.5 times that of Hugging Face's layers in the same dtype."""
    loss, truth = gradients(build(torch.float32, **full))
    plain_loss, plain = gradients(build(dtype, **full))
    fused = liger_runs() and not full  # Liger's norms need weight and input in the same dtype
    lean_loss, lean = gradients(build(dtype, plan, fused, **full))
    assert worst(plain, truth) > 0
    assert worst(lean, truth) < 1.5 * worst(plain, truth) + 1e-3
    assert abs(lean_loss - loss) < 2 * abs(plain_loss - loss) + 2e-3


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_fp32_equals_the_plain_path(build, plan):
    """Without fused kernels, up to the order of summation."""
    loss, truth = gradients(build(torch.float32))
    lean_loss, lean = gradients(build(torch.float32, plan))
    assert lean_loss == pytest.approx(loss, abs=1e-5)
    assert worst(lean, truth) < 1e-4


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_memory_does_not_grow(build, plan):
    model = build(torch.bfloat16, plan)
    seen = []
    for _ in range(6):
        gradients(model)
        seen.append(torch.cuda.memory_allocated())
    assert seen[2:] == [seen[2]] * 4
