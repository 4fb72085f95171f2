"""Random passages of a book, and their true continuations."""

import json
import random
from itertools import islice

import pytest
from transformers import AutoTokenizer

from component.error import UserError
from script.experiment.downstream.passages import passages
from tests.words import COMMON

DEMO_BASE = "script/demo/base"  # its tokenizer was trained on real text: tokens are words


def test_passages_are_pieces_of_the_book(tmp_path):
    tokenizer, draw = AutoTokenizer.from_pretrained(DEMO_BASE, model_max_length=10**9), random.Random(2)
    sentences = (" ".join(draw.choices(COMMON, k=draw.randint(4, 30))) for _ in range(2000))
    book, file = "".join(f"{text}.{draw.choice((' ', chr(10)))}" for text in sentences), tmp_path / "books.jsonl"
    file.write_text(json.dumps({"id": "book", "text": book}) + "\n")
    found = list(islice(passages(file, tokenizer, (300, 600), 40, "1"), 8))
    for passage in found:
        at = book.index(passage["prompt"])
        assert book[at:].startswith(passage["prompt"] + passage["true"])
        assert book[at - 1] == "\n"
        assert passage["prompt"].endswith(".")
        assert 300 <= passage["tokens"] == len(tokenizer(passage["prompt"]).input_ids) <= 600
        assert abs(len(tokenizer(passage["true"], add_special_tokens=False).input_ids) - 40) <= 1
    assert found == list(islice(passages(file, tokenizer, (300, 600), 40, "1"), 8))
    with pytest.raises(UserError, match=r"--source.*900000 tokens"):
        next(passages(file, tokenizer, (300, 900_000), 40, "1"))
    file.write_text(json.dumps({"text": "no end " * 3000}) + "\n")
    with pytest.raises(UserError, match=r"--source.*sentences"):
        next(passages(file, tokenizer, (300, 600), 40, "1"))
