"""How far are LoRA's gradients from others? Relative error and cosine similarity, by layer and by projection."""

import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

Gradients = dict[str, Tensor]  # by the parameter's name
LORA = re.compile(r"layers\.(\d+)\..*?(\w+)\.lora_([AB])\.")


class Agreement:
    """How near found gradients are to the exact ones, by group; all that is added counts as one long vector."""

    def __init__(self) -> None:
        # |found - exact|^2, |exact|^2, |found|^2 and their product, by group
        self.sums: dict[tuple[str, str], Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))

    def add(self, found: Gradients, exact: Gradients) -> None:
        for name, right in exact.items():
            left = found[name]
            pairs = ((left - right, left - right), (right, right), (left, left), (left, right))
            products = torch.stack([torch.sum(a * b, dtype=torch.float64) for a, b in pairs]).cpu()
            for group in groups_of(name):
                self.sums[group] += products

    def result(self) -> dict[str, Any]:
        """{"total": {...}, "by_layer": {"0": {...}}, "by_projection": ..., "by_matrix": ...}."""
        found: dict[str, Any] = {}
        for (kind, name), (off, exact, own, product) in self.sums.items():
            cosine = product / (exact.sqrt() * own.sqrt())
            errors = {"relative_error": off.sqrt() / exact.sqrt(), "cosine": cosine}
            errors["norm_ratio"] = own.sqrt() / exact.sqrt()
            found.setdefault(kind, {})[name] = {key: round(float(value), 7) for key, value in errors.items()}
        return {"total": found.pop("total")["all"], **found}


def agreement(found: Gradients, exact: Gradients) -> Agreement:
    """Of one set of gradients."""
    one = Agreement()
    one.add(found, exact)
    return one


def groups_of(name: str) -> list[tuple[str, str]]:
    """To what the parameter `...layers.3.self_attn.q_proj.lora_A.default.weight` belongs."""
    place = LORA.search(name)
    assert place is not None, name
    layer, projection, matrix = place.groups()
    return [("total", "all"), ("by_layer", layer), ("by_projection", projection), ("by_matrix", matrix)]
