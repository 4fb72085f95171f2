"""The original's attention, as in the baseline `original`."""

import torch

from script.performance.peers import rolled_s2


def test_the_original_rolls():
    """Compared with a loop over the published definition: half of the heads rolled, groups of a quarter."""
    query, key, value = torch.randn(3, 1, 4, 16, 8)
    found, _ = rolled_s2(None, query, key, value, None, scaling=8**-0.5)
    for head in range(4):
        order = torch.arange(16).roll(-2 if head >= 2 else 0)
        for group in order.split(4):
            for place, token in enumerate(group):
                seen = group[: place + 1]
                weights = (query[0, head, token] @ key[0, head, seen].T * 8**-0.5).softmax(-1)
                torch.testing.assert_close(found[0, token, head], weights @ value[0, head, seen])
