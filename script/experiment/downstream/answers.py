"""How many short answers does a model give as expected? Greedy, after the prompt of its own chat template."""

import re
from pathlib import Path
from typing import Any

from component.data.chat_template import encode_conversation
from component.evaluate.ruler import model_answer
from component.evaluate.ruler_prompt import Sample
from component.loading import load_model, recorded_template
from component.tokenizer import UNLIMITED, load_tokenizer
from script.experiment.downstream.split import Record

ROOM = 2  # times the tokens of the longest expected answer, since a model may say more


def answers(model: Path, adapter: Path | None, records: list[Record], most_tokens: int) -> dict[str, Any]:
    """Answer the `input` of each record.

    Args:
        most_tokens: of any `output`; answers may have ROOM times as many.

    Returns:
        {"questions", "exact": how many are equal but for case and punctuation, "begins": how many begin so,
        "answers"}.
    """
    tokenizer = load_tokenizer(str(adapter or model), UNLIMITED)
    loaded = load_model(str(model), str(adapter) if adapter else None)
    answer, template = model_answer(loaded, tokenizer), recorded_template(tokenizer)
    found = []
    for record in records:
        ids, _ = encode_conversation(tokenizer, [(record["input"], None)], None, template)
        found += answer([Sample(ids, [record["output"]], ROOM * most_tokens)])
    pairs = [(words(given), words(record["output"])) for given, record in zip(found, records, strict=True)]
    return {
        "questions": len(records),
        "exact": sum(given == expected for given, expected in pairs),
        "begins": sum(given[: len(expected)] == expected for given, expected in pairs),
        "answers": found,
    }


def words(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation; of a text that has none of them, its other parts."""
    return re.findall(r"\w+", text.lower()) or text.split()
