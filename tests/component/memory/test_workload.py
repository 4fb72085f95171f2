"""Bytes of a training step, against independent calculations and against real models."""

import dataclasses

import pytest
import torch

from component.adapter import add_adapter, linear_names, target_layers
from component.memory.workload import fixed_bytes, gathered_bytes, left_bytes, step_bytes, workload
from tests.reference.llama2_7b import LINEAR, LLAMA2_7B, LORA
from tests.reference.plain_path import GROUP, LAYERS, TOKENS, tiny_base, tiny_config


@pytest.mark.parametrize(
    ("zero", "offload", "optimizer", "per_trained"),
    [
        (
            True,
            False,
            "paged_adamw_32bit",
            2 + 4 + 2,
        ),  # half values, fp32 master weights, half gradients
        (True, False, "adamw_torch", 2 + 4 + 2 + 8),  # and two fp32 moments
        (True, False, "adamw_bnb_8bit", 2 + 4 + 2 + 2),
        (True, True, "adamw_torch", 2),
        (False, False, "paged_adamw_32bit", 4 + 4),
        (False, False, "adamw_torch", 4 + 4 + 8),
        (False, False, "sgd", 4 + 4),
    ],
)
def test_fixed_bytes(zero, offload, optimizer, per_trained):
    """NF4: 4 bits per weight, one byte of scale per 64 weights, four bytes of second-level scale per 256 scales."""
    assert (LINEAR, LORA) == (202_375_168, 4_997_120)
    work = dataclasses.replace(LLAMA2_7B, zero=zero, offload_optimizer=offload, optimizer=optimizer)
    weights = 32 * 202_375_168
    nf4 = weights // 2 + weights // 64 + weights // 64 // 256 * 4
    embeddings = 2 * 32000 * 4096 * 2
    assert fixed_bytes(work) == nf4 + embeddings + 32 * 4_997_120 * per_trained
    half = dataclasses.replace(work, in_4bit=False)
    assert fixed_bytes(half) == 2 * weights + embeddings + 32 * 4_997_120 * per_trained
    assert step_bytes(work) == (4 * 32 * 4_997_120 if zero and not offload else 0)


def test_zero_3_partitions_all_but_the_scales():
    """A quarter of everything on each of 4 GPUs; two layers are whole, and lm_head in the loss."""
    whole = dataclasses.replace(LLAMA2_7B, zero=True, optimizer="adamw_torch")
    work = dataclasses.replace(whole, processes=4, shards=4)
    scales = 32 * LINEAR // 64 + 32 * LINEAR // 64 // 256 * 4
    assert fixed_bytes(work) == (fixed_bytes(whole) - scales) / 4 + scales
    assert gathered_bytes(work) == (2 * (LINEAR / 2 + LORA * 2), 32000 * 4096 * 2)
    assert gathered_bytes(whole) == (0, 0)


@pytest.mark.parametrize(("processes", "zero", "more"), [(1, False, 0), (2, False, 4), (2, True, 0)])
def test_k11_ddp_has_buckets(processes, zero, more):
    """One fp32 copy of each gradient."""
    alone = dataclasses.replace(LLAMA2_7B, zero=zero)
    several = dataclasses.replace(alone, processes=processes)
    assert fixed_bytes(several) - fixed_bytes(alone) == more * 32 * LORA


@pytest.mark.parametrize(
    ("changes", "tokens_from_the_left"),
    [
        ({"sequence_processes": 1, "group": 8192}, 0),
        ({"sequence_processes": 4, "group": 8192}, 4096),  # groups as long as a part: half of one, in shifted heads
        ({"sequence_processes": 4, "group": 16384}, 8192),  # all of a part, in unshifted or in shifted heads
        ({"sequence_processes": 4, "group": 4096}, 2048),
        ({"sequence_processes": 4, "group": 32768, "full_steps": True}, 0),  # by heads
        ({"sequence_processes": 3, "group": 24576, "full_steps": True}, 16384),  # 32 heads over 3: from the left
        ({"sequence_processes": 4, "group": 8192, "rows": 2, "tokens": 16384}, 2 * 4096),
    ],
)
def test_what_comes_from_the_left(changes, tokens_from_the_left):
    """Keys and values of 32 heads of 128 16-bit numbers; 8192 tokens per process and row."""
    work = dataclasses.replace(LLAMA2_7B, **{"tokens": 8192, **changes})
    assert left_bytes(work) == tokens_from_the_left * 2 * 32 * 128 * 2


def test_nf4_bytes_equal_bitsandbytes():
    import bitsandbytes as bnb

    weight = torch.randn(512, 1024)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    held = [packed, state.absmax, state.state2.absmax]
    work = dataclasses.replace(LLAMA2_7B, weights=weight.numel(), embeddings=0, trained=0)
    assert fixed_bytes(work) == sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize(
    ("family", "changes", "adapter"),
    [
        ("llama", {}, {}),
        ("mistral", {}, {"target_names": ["q_proj", "v_proj"]}),
        ("qwen2", {}, {"train_embedding": True, "train_norm": True}),
        ("qwen3", {"tie_word_embeddings": True}, {"train_embedding": True, "train_norm": True}),
        ("qwen3", {}, {"train_norm": True}),
        ("llama", {"tie_word_embeddings": True}, {"train_embedding": True}),
        ("llama", {"num_key_value_heads": 4}, {"target_names": ["q_proj", "lm_head"]}),
        ("llama", {}, {"target_names": ["1.self_attn.q_proj", "mlp.up_proj"]}),
    ],
)
def test_workload_equals_a_real_model(family, changes, adapter):
    config = tiny_config(family, **changes)
    work = workload(config, rank=4, tokens=TOKENS, group=GROUP, **{"target_names": None, **adapter})
    base = tiny_base(config)
    blocks = [layer for _, layer in target_layers(base, linear_names(base))]
    assert work.weights == sum(layer.weight.numel() for layer in blocks)
    assert work.embeddings == sum(
        parameter.numel() for name, parameter in base.named_parameters() if "embed" in name or "lm_head" in name
    )
    attention = base.model.layers[0].self_attn
    assert work.heads * work.head_size == attention.q_proj.out_features
    assert work.kv_heads * work.head_size == attention.k_proj.out_features
    assert (work.layers, work.tokens, work.group, work.rank) == (LAYERS, TOKENS, GROUP, 4)
    model = add_adapter(base, rank=4, alpha=8, dropout=0.0, **adapter)
    assert work.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_workload_leaves_the_config_and_the_random_numbers_alone():
    config = tiny_config()
    before, state = config.to_dict(), torch.get_rng_state()
    workload(config, target_names=None, rank=4, tokens=TOKENS, group=GROUP)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
