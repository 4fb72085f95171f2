"""Does a merged model equal the adapter on its base? What is compared, printed and refused."""

import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from component.error import UserError
from component.loading import load_model
from component.merge import check as merge_check
from component.merge.check import Agreement, agreement, check_merged, fixed_input
from component.merge.pair import Difference
from tests.component.merge.test_stream import Merge, plant
from tests.merging import save_adapter


def test_agreement_by_hand():
    """Two positions, three tokens; the top-1 token of the second differs."""
    ours = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]])
    theirs = torch.tensor([[1.0, 2.0, 4.0], [7.0, 0.0, 6.0]])
    found = agreement(ours, theirs, torch.tensor([7, 8]))
    assert (found.first, found.last, found.largest, found.same_argmax) == (7, 8, 7.0, 0.5)
    assert found.mean == pytest.approx(8 / 6)
    assert found.spread == pytest.approx(math.sqrt(50 / 6 - 4))  # mean of squares 50/6, mean 2
    assert not math.isfinite(agreement(ours, theirs * math.nan, torch.tensor([7, 8])).mean)


def test_the_text_stands_at_both_ends_of_the_context(tokenizer):
    ids, positions = fixed_input(tokenizer, 8192)
    assert ids.shape == positions.shape == (2, 64)
    assert positions[:, [0, 63]].tolist() == [[0, 63], [8128, 8191]]
    once = tokenizer(merge_check.TEXT).input_ids
    assert ids.flatten().tolist() == (once * 9)[:128]


def test_a_short_context_is_compared_once(tokenizer):
    for context, places, tokens in ((64, 1, 64), (20, 1, 20), (65, 2, 64)):
        ids, positions = fixed_input(tokenizer, context)
        assert ids.shape == positions.shape == (places, tokens)
        assert int(positions.max()) == context - 1


@pytest.fixture
def merge(bases, tmp_path):
    save_adapter(tmp_path / "adapter", bases(), modules_to_save=["norm"])
    return Merge(tmp_path / "merged", bases(), tmp_path / "adapter", torch.float16)


def checked(merge, tokenizer, **options) -> list[Agreement]:
    load_adapted = partial(load_model, str(merge.base), str(merge.adapter), context_size=256)
    return check_merged(
        merge.folder, merge.plan, str(merge.adapter), merge.config, tokenizer, load_adapted, **options
    )  # fmt: skip


@pytest.mark.parametrize("streams", [True, False])
def test_an_honest_merge_is_reported(merge, tokenizer, monkeypatch, capsys, streams):
    monkeypatch.setattr(merge_check, "can_stream", lambda config: streams)
    results = checked(merge, tokenizer)
    assert [(each.first, each.last) for each in results] == [(0, 63), (192, 255)]
    assert all(0 < each.mean < 0.01 * each.spread for each in results)
    printed = capsys.readouterr().out
    assert "positions 0 to 63: logits differ by" in printed
    assert "positions 192 to 255: logits differ by" in printed
    kinds = dict(re.findall(r"(\w+) (\d\.\de-\d\d)[,\n]", printed))
    assert bool(kinds) == streams
    for kind in kinds.keys() - {"embedding", "states"}:
        assert 1e-4 < float(kinds[kind]) < 2**-11, kind
    assert ("whole models are loaded" in printed) != streams


def test_both_ways_see_the_same(merge, tokenizer, monkeypatch):
    one = checked(merge, tokenizer)
    monkeypatch.setattr(merge_check, "can_stream", lambda config: False)
    for ours, theirs in zip(one, checked(merge, tokenizer), strict=True):
        assert ours.mean == pytest.approx(theirs.mean, rel=1e-2)
        assert ours.spread == pytest.approx(theirs.spread, rel=1e-4)


def test_a_wrong_tensor_is_refused_by_name(merge, tokenizer):
    plant(merge.folder, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UserError) as caught:
        checked(merge, tokenizer)
    message = str(caught.value)
    assert message.startswith(
        "--check: model.layers.1.mlp.up_proj.weight of the merged model differs from the adapter"
    )
    assert "by 1.0" in message
    assert "rounding explains 0.06%; compare it with" in message
    assert "more differ" not in message


def test_several_wrong_tensors(merge, tokenizer):
    for name in ("lm_head", "model.norm", *(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")):
        plant(merge.folder, f"{name}.weight")
    with pytest.raises(UserError, match=r"0\.self_attn\.q_proj\.weight of .* \(4 more differ: .*v_proj.*, \.\.\.\);"):
        checked(merge, tokenizer)


def test_whole_models_that_differ_are_refused(merge, tokenizer, monkeypatch):
    weights = load_file(merge.folder / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"] *= 1.5
    save_file(weights, merge.folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(merge_check, "can_stream", lambda config: False)
    with pytest.raises(UserError, match=r"--check: at positions 0 to 63 the merged model's logits differ"):
        checked(merge, tokenizer)


def test_without_memory_for_whole_models_it_says_what_to_do(merge, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(merge_check, "can_stream", lambda config: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    assert checked(merge, tokenizer, hint_if_skipped="run this on a larger machine") == []
    assert "0.0 GB are free; run this on a larger machine" in capsys.readouterr().err
    assert len(checked(merge, tokenizer)) == 2  # --check yes


def test_hidden_states_and_logits_are_refused_where_no_tensor_differs():
    hidden = Difference("hidden states", bound=0.01, gap=1.0, norm=4.0)
    with pytest.raises(UserError, match=r"hidden states after layer 0 of the merged model differs .* by 50.00%"):
        merge_check._refuse({"hidden states after layer 0": hidden}, [], 0.01)
    for mean, is_refused in ((0.019, False), (0.021, True), (math.inf, True), (math.nan, True)):
        result = Agreement(0, 63, 1.0, mean, 2.0, 1.0)
        if is_refused:
            with pytest.raises(UserError, match="logits differ"):
                merge_check._refuse({}, [result], 0.01)
        else:
            merge_check._refuse({}, [result], 0.01)
