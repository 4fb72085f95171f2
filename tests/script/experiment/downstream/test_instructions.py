"""Long instructions: how questions are truncated, and which flags are rejected."""

import json
import random
import shutil

import pytest
from transformers import AutoTokenizer

from component.data import IGNORE_INDEX
from component.data.chat_template import encode_chat
from component.error import UserError
from script.experiment.downstream.instructions import end_of_question
from tests.script.experiment.downstream.mistakes import refuses
from tests.words import text_of, write_lines

INSTRUCTIONS = "script/experiment/downstream/instructions.py"
DEMO_BASE = "script/demo/base"  # its tokenizer was trained on real text: tokens are words


def test_the_end_of_a_question_is_kept_and_the_answer_is_the_same():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    record = {"input": text_of(random.Random(1), 800) + "\n\nWho was it?", "output": "It was he."}
    cut = end_of_question(tokenizer, record, 256)
    assert record["input"].endswith(cut["input"])
    (ids, labels), (_, whole) = (encode_chat(tokenizer, [(r["input"], r["output"])]) for r in (cut, record))
    assert 250 <= len(ids) <= 256
    answer, of_whole = ([label for label in found if label != IGNORE_INDEX] for found in (labels, whole))
    assert answer == of_whole
    assert end_of_question(tokenizer, cut, 256) == cut


def test_an_answer_that_leaves_no_room_for_a_question():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    record = {"input": "Who was it?", "output": text_of(random.Random(1), 300)}
    with pytest.raises(
        UserError, match=r"--max_answer_tokens: an answer of \d{3} tokens .* a context of 256; use fewer"
    ):
        end_of_question(tokenizer, record, 256)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--held_out", "1"], ["--held_out", "1.0"]),
        (["--source", "/no/such"], ["--source", "/no/such"]),
        (["--per_document", "0"], ["--per_document", "at least 1"]),
        (["--short_base", "no/such/folder"], ["--short_base: there is no model folder 'no/such/folder'"]),
        (["--jobs", "0"], ["--jobs", "at least 1"]),
    ],
)
def test_mistakes(words, parts, run_program, base_folder, tmp_path):
    refuses(run_program, "instructions", words, parts, base_folder, tmp_path)


@pytest.mark.slow
def test_answers_are_trained_and_asked_for_with_the_models_own_template(run_program, tmp_path):
    base = shutil.copytree(DEMO_BASE, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(base)
    records = [{"input": f"{at} dogs. Who?", "output": "He."} for at in range(10)]
    write_lines(tmp_path / "chats.jsonl", *records)
    words = ["--base", base, "--short_base", shutil.copytree(base, tmp_path / "short"), "--jobs", 2]
    words += ["--source", tmp_path / "chats.jsonl", "--work", tmp_path / "work"]
    output = tmp_path / "out.json"
    outcome = run_program(INSTRUCTIONS, *words, "--max_steps", 3, "--output_json", output)
    assert outcome.status == 0, outcome.err
    models = json.loads(output.read_text())["models"]
    assert models["short"]["loss_before"] == models["extended"]["loss_before"], "the same model, side by side"
    found = models["extended"]
    assert json.loads((tmp_path / "work/extended.json").read_text()) == found
    assert found["settings"]["template"] == "tokenizer"
    assert found["short_answers"]["before"]["questions"] == found["data"]["held_out"]["samples"] > 0
    last = json.loads((tmp_path / "work/extended/eval_results.json").read_text())["eval_loss"]
    assert [step for step, _ in found["eval_losses"]] == [0, 3]
    assert found["loss_before"] > 0
    assert found["loss_before"] != found["loss_after"] == last
    measured = json.loads((tmp_path / "work/fitting.stats.json").read_text())
    tokens = len(tokenizer(f"user: 0 dogs. Who?{tokenizer.eos_token}assistant: He.{tokenizer.eos_token}").input_ids)
    assert abs(measured["lengths"]["median"] - tokens) <= 1, "what fits is measured in the template of training"
