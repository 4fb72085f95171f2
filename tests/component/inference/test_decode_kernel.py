"""How does one new token attend to quantized blocks? As to the same blocks dequantized.

Without a GPU, Triton's interpreter runs the kernel, if Triton is installed: TRITON_INTERPRET=1 python -m pytest FILE
"""

import os

import pytest
import torch

from component.inference import quantized_layer
from component.inference.block_attention import decoded, runs_kernel
from component.inference.quantized_layer import BlockQuantizedLayer, History

pytest.importorskip("triton")
on_cpu = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=on_cpu), pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
@pytest.mark.parametrize("after", [0, 17, 63], ids="{} tokens after the blocks".format)
@pytest.mark.parametrize(("head_size", "kv_heads", "shared"), [(64, 2, 1), (128, 2, 3), (16, 1, 4)])
def test_equals_attention_to_dequantized_blocks(device, name, after, head_size, kv_heads, shared, monkeypatch):
    monkeypatch.setattr(quantized_layer, "SEGMENT", 10)
    dtype = torch.float16 if device == "cuda" else torch.float32
    keys = 3 * torch.randn(1, kv_heads, 64 * 30 + after + 1, head_size, device=device, dtype=dtype) + 1
    values = torch.randn_like(keys) + 0.3
    query = torch.randn(1, kv_heads * shared, 1, head_size, device=device, dtype=dtype)
    layer = BlockQuantizedLayer(name, keeps_blocks=True)
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    history = layer.update(keys[:, :, -1:], values[:, :, -1:])[0].history
    assert history.segments() == [8, 8, 10, 4]
    assert runs_kernel(query, history) == (device == "cuda")
    found = decoded(query, history, 0.2)
    parts = list(zip(*(history.dequantized(*item) for item in enumerate(history.segments())), strict=True))
    for part, exact in zip(parts, (keys, values), strict=True):
        assert (torch.cat(part, 2) - exact[:, :, : 64 * 30]).abs().max() > 1e-4, "the blocks were quantized"
    blocks = [torch.cat(part, 2) for part in parts]
    rest = [exact[:, :, 64 * 30 :] for exact in (keys, values)]
    key, value = (torch.cat(two, 2).double().repeat_interleave(shared, 1) for two in zip(blocks, rest, strict=True))
    expected = (0.2 * query.double() @ key.transpose(2, 3)).softmax(3) @ value
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4e-3 if device == "cuda" else 1e-5)


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_where_it_runs(name):
    layer = BlockQuantizedLayer(name, keeps_blocks=True)
    layer.update(torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70, 8))
    assert not runs_kernel(torch.randn(1, 2, 1, 8), History(layer, 1, layer.keys, layer.values)), "no GPU"
