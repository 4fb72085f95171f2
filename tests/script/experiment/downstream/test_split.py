"""Questions about one document are on one side of the split."""

import random

import pytest

from component.error import UserError
from script.experiment.downstream.split import SHARED_LINE, documents, split
from tests.words import text_of


def test_a_document_is_on_one_side_only():
    draw, records = random.Random(0), []
    for number in range(60):
        text = text_of(draw, 400)
        for question in range(draw.randint(1, 4)):
            frame = ("{}\n\n{}", "Read this:\n{}\n{}", "{1}\n{0}")[question % 3]
            records.append({"input": frame.format(text, f"Question {question}?"), "output": "a", "of": str(number)})
    draw.shuffle(records)
    groups = documents(records)
    assert sorted(len({record["of"] for record in group}) for group in groups) == [1] * 60
    for seed in range(5):
        sides = split(groups, 0.2, seed)
        held, trained = ({record["of"] for group in sides[side] for record in group} for side in ("held_out", "train"))
        assert not held & trained
        assert held | trained == {str(number) for number in range(60)}
        count = sum(map(len, sides["held_out"]))
        assert 0.15 * len(records) < count <= 0.2 * len(records)
    assert split(groups, 0.2, 1) == split(groups, 0.2, 1) != split(groups, 0.2, 2)


def test_documents_are_grouped_transitively():
    one, two, three = ("x" * SHARED_LINE, "y" * SHARED_LINE, "z" * (SHARED_LINE - 1))
    texts = [one, f"{three}\n{two}", three, f" {one} \n{two}"]
    found = documents([{"input": text, "output": ""} for text in texts])
    assert sorted(len(group) for group in found) == [1, 3], "short lines do not count"
    with pytest.raises(UserError, match="--held_out"):
        split(found[:1], 0.5, 0)
