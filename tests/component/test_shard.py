"""Do the shards of ZeRO-3, gathered, equal the weights that one process loads? NF4 byte for byte.

Slow, since DeepSpeed compiles an operator for minutes the first time.
"""

from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from component.error import UserError
from component.model import load_base, load_config
from component.shard import load_shards
from tests.processes import run_in_processes
from tests.reference.plain_path import tiny_base, tiny_config

pytestmark = pytest.mark.slow
PROCESSES = 3  # divides none of the sizes
ZERO_3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
CASES = [  # folder, dtype, in 4 bits
    ("llama", torch.float32, False),
    ("llama", torch.bfloat16, True),
    ("tied", torch.float32, True),
    ("tied", torch.bfloat16, False),
    ("qwen2", torch.float16, True),
    ("stored", torch.float32, True),  # of which Hugging Face casts nothing
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, family, tied in (("llama", "llama", False), ("tied", "llama", True), ("qwen2", "qwen2", False)):
        tiny_base(tiny_config(family, s2=False, tie_word_embeddings=tied)).save_pretrained(folder / name)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", quantization_config=options)
    model.save_pretrained(folder / "stored")
    for name, value in (("infinite", float("inf")), ("missing", None)):
        tiny_base(tiny_config(s2=False)).save_pretrained(folder / name)
        weights = load_file(folder / name / "model.safetensors")
        if value is None:
            del weights["model.layers.1.mlp.up_proj.weight"]
        else:
            weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def compare(folder: Path) -> None:
    device = torch.device("cpu")
    for name, dtype, in_4bit in CASES:
        source, options = str(folder / name), {"dtype": dtype, "load_in_4bit": in_4bit, "device": device}
        whole = load_base(source, load_config(source), **options)
        zero = HfDeepSpeedConfig(ZERO_3)  # active while it lives
        model = load_shards(source, load_config(source), **options)
        unset_hf_deepspeed_config()
        del zero
        expected = dict(whole.named_parameters())
        assert [other for other, _ in model.named_parameters()] == list(expected)
        assert any(hasattr(p, "quant_state") for p in expected.values()) == in_4bit
        for other, parameter in model.named_parameters():
            assert parameter.numel() == 0, other
            assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // PROCESSES)
            assert not parameter.requires_grad
            with deepspeed.zero.GatheredParameters([parameter]):
                assert torch.equal(bytes_of(parameter), bytes_of(expected[other])), (name, other)
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                wanted = expected[other].quant_state
                assert torch.equal(state.absmax, wanted.absmax)
                assert torch.equal(state.offset, wanted.offset)
                assert torch.equal(state.state2.absmax, wanted.state2.absmax)
                assert (state.dtype, state.shape) == (wanted.dtype, wanted.shape)
        for (other, buffer), (_, wanted) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
            assert torch.equal(buffer, wanted), other
        if name == "tied":
            assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.is_loaded_in_4bit if in_4bit else not getattr(model, "is_loaded_in_4bit", False)
        assert (model.dtype, model.training) == (dtype, False)


def test_gathered_shards_are_the_weights(folder):
    run_in_processes(compare, PROCESSES, folder)


def refuse(folder: Path) -> None:
    options = {"dtype": torch.float32, "load_in_4bit": True, "device": torch.device("cpu")}
    problems = {
        "infinite": r"model\.layers\.1\.mlp\.up_proj\.weight holds infinite or NaN values in float32",
        "missing": r"lacks 1 weights of its config, such as model\.layers\.1\.mlp\.up_proj\.weight",
    }
    zero = HfDeepSpeedConfig(ZERO_3)
    for name, message in problems.items():
        with pytest.raises(UserError, match=message):
            load_shards(str(folder / name), load_config(str(folder / name)), **options)
        dist.barrier()
    del zero


def test_every_process_raises(folder):
    """Also those that did not read the weight, which would wait for it."""
    run_in_processes(refuse, PROCESSES, folder)
