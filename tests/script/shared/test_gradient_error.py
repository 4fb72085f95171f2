"""script/shared/gradient_error.py: literal vectors."""

import pytest
import torch

from script.shared.gradient_error import Agreement, agreement

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
UP = "base_model.model.model.layers.11.mlp.up_proj.lora_B.default.weight"


def errors(relative_error: float, cosine: float, norm_ratio: float):
    return pytest.approx({"relative_error": relative_error, "cosine": cosine, "norm_ratio": norm_ratio}, abs=1e-6)


def test_groups():
    exact = {Q: torch.tensor([[3.0, 4.0]]), UP: torch.tensor([[0.0], [2.0]])}
    found = {Q: torch.tensor([[4.0, 3.0]]), UP: torch.tensor([[0.0], [3.0]])}
    q, up = errors(2**0.5 / 5, 24 / 25, 1), errors(0.5, 1, 1.5)
    assert agreement(found, exact).result() == {
        "total": errors((3 / 29) ** 0.5, 30 / (29 * 34) ** 0.5, (34 / 29) ** 0.5),
        "by_layer": {"0": q, "11": up},
        "by_projection": {"q_proj": q, "up_proj": up},
        "by_matrix": {"A": q, "B": up},
    }


def test_all_that_is_added_is_one_vector():
    """Opposite errors do not cancel."""
    both = Agreement()
    for error in (0.5, -0.5):
        both.add({Q: torch.tensor([3 + error, 4.0])}, {Q: torch.tensor([3.0, 4.0])})
    assert both.result()["total"]["relative_error"] == pytest.approx(0.1)
