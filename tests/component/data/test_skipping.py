"""Skipped positions: literal ones, what they cover, and a model that gets them against Hugging Face's.

Shapes: B batch, T tokens.
"""

import copy
import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from component.attention.interface import use_shift_short_attention
from component.data.collator import RightPadCollator
from component.data.skipping import PositionSkipping, row_key
from component.rope import extend_context
from tests.reference.shift_short import is_shifted, seen

ROWS = [[1, 5, 6, 7, 8, 9, 3, 4, 2], [1, 8, 4]]
# (seed, step): positions of ROWS in a context of 40 tokens
LITERAL = {
    (42, 0): [[0, 1, 30, 31, 32, 33, 34, 35, 36], [0, 7, 8, 9, 10, 11, 12, 13, 14]],
    (42, 1): [[0, 1, 2, 3, 4, 15, 16, 17, 18], [0, 1, 16, 17, 18, 19, 20, 21, 22]],
    (43, 0): [[0, 18, 19, 20, 21, 22, 23, 24, 25], [0, 18, 19, 20, 21, 22, 23, 24, 25]],
}


def samples(rows: list[list[int]]) -> list[dict]:
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]


def test_literal_positions():
    """By seed and step; padding runs on."""
    batch = RightPadCollator(0, with_rows=True)(samples(ROWS))
    found = {(seed, step): PositionSkipping(40, seed).apply(batch, step) for seed, step in ((42, 0), (42, 1), (43, 0))}
    assert {key: batch["position_ids"].tolist() for key, batch in found.items()} == LITERAL
    assert all(batch.keys() == found[42, 0].keys() for batch in found.values())
    assert "rows" not in found[42, 0]
    assert batch["position_ids"].tolist() == [list(range(9))] * 2  # unchanged


def test_a_row_s_key_is_a_hash_of_its_tokens():
    tokens = b"".join(token.to_bytes(8, "little") for token in (1, 8, 31999))
    digest = hashlib.blake2b(tokens, digest_size=8).digest()
    assert row_key([1, 8, 31999]) == int.from_bytes(digest, "little") // 2
    keys = {row_key(row) for row in ([1, 8], [8, 1], [1, 8, 0], [1], [])}
    assert len(keys) == 5
    assert all(0 <= key < 2**63 for key in keys)


@pytest.mark.parametrize(("length", "context"), [(1, 7), (2, 3), (2, 64), (7, 8), (29, 83)])
def test_two_chunks_cover_the_context(length, context):
    """Each chunk is contiguous, the first begins at 0, and every cut, skip and distance occurs."""
    batch = RightPadCollator(0, with_rows=True)(samples([list(range(length))]))
    cuts, skips, last = set(), set(), set()
    for step in range(40 * context):
        row = PositionSkipping(context, 1).apply(batch, step)["position_ids"][0].tolist()
        jumps = [place for place in range(1, length) if row[place] != row[place - 1] + 1]
        assert len(jumps) <= 1
        assert row[0] == 0
        assert all(place < following for place, following in pairwise(row))
        cuts |= set(jumps)
        skips.add(row[-1] - (length - 1))
        last.add(row[-1])
    assert max(last) < context
    if length > 1:
        assert cuts == set(range(1, length))
        assert skips == set(range(context - length + 1))
    else:
        assert skips == {0}


def test_cuts_and_skips_are_uniform_and_independent():
    drawn = np.array([PositionSkipping(109, 7).draw(key, 11, 3) for key in range(20000)])
    assert np.bincount(drawn[:, 0], minlength=11)[1:].min() > 1800  # of 2000 each
    assert np.bincount(drawn[:, 1], minlength=99).min() > 130  # of 202
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.03


def test_positions_do_not_depend_on_the_batch():
    """Alone, in another order, padded, and split over processes."""
    rows = [list(range(first, first + length)) for first, length in ((0, 29), (7, 13), (3, 24))]
    skipping = PositionSkipping(83, 5)
    whole = skipping.apply(RightPadCollator(0, with_rows=True)(samples(rows)), 9)["position_ids"]
    assert len({tuple(row) for row in whole.tolist()}) == 3
    for row, positions in zip(rows, whole, strict=True):
        alone = skipping.apply(RightPadCollator(0, with_rows=True)(samples([row])), 9)["position_ids"][0]
        assert torch.equal(alone, positions[: len(row)])
    for parts in (2, 3):
        collated = [RightPadCollator(0, part, parts, with_rows=True)(samples(rows)) for part in range(parts)]
        joined = torch.cat([skipping.apply(batch, 9)["position_ids"] for batch in collated], dim=1)
        assert torch.equal(joined[:, :29], whole)


def explicit_mask(lengths: list[int], heads: int, kv_heads: int, group_size: int | None) -> Tensor:
    """(B, H, T, T), 0 where a token attends and -inf elsewhere, from places in the row alone."""
    longest = max(lengths)
    of_head = [
        seen(longest, (0,), group_size or 2 * longest, group_size is not None and is_shifted(head, heads, kv_heads))
        for head in range(heads)
    ]
    visible = torch.stack(of_head)[None].repeat(len(lengths), 1, 1, 1)
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("lengths", [[29], [37, 23, 2]])
def test_logits_and_gradients_equal_hugging_faces(tiny_llama_config, rope_type, group_size, lengths):
    """A stock model is told the positions, and who attends to whom by an explicit mask."""
    config = tiny_llama_config
    extend_context(config, 192, rope_type)
    ids = torch.Generator().manual_seed(4)
    rows = [torch.randint(2, 384, (length,), generator=ids).tolist() for length in lengths]
    batch = PositionSkipping(192, 42).apply(RightPadCollator(1, with_rows=True)(samples(rows)), 2)
    assert (batch["position_ids"].diff() > 1).any()

    ours = copy.deepcopy(config)
    use_shift_short_attention(ours, group_size)
    theirs = copy.deepcopy(config)
    theirs._attn_implementation = "eager"
    models = [LlamaForCausalLM(ours).train(), LlamaForCausalLM(theirs).train()]
    models[1].load_state_dict(models[0].state_dict())
    heads = (config.num_attention_heads, config.num_key_value_heads)
    masks = [batch["attention_mask"], explicit_mask(lengths, *heads, group_size)]
    real = batch["attention_mask"].bool()
    found = []
    for model, mask in zip(models, masks, strict=True):
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}
        logits = model(**inputs, use_cache=False).logits[real]
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).mean().backward()
        found.append((logits.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
    assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in found[0][1].values())
    for name, gradient in found[0][1].items():
        assert_close(gradient, found[1][1][name], atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        unskipped = models[0](batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[real]
    assert (unskipped - found[0][0]).abs().max() > 1e-2
