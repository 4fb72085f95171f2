"""Base, longer context, merge, instruction tuning, merge, chat about a document: with the two YAMLs made for it.

Their sizes are those of a small model; the context grows eightfold, as in the files.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from component.data.chat_template import encode_chat
from tests.conftest import ROOT, TEXTS
from tests.script.test_merge_lora import merge
from tests.train_run import finish, record

ORIGINAL, CONTEXT, NEW = 64, 512, 8  # tokens: of the base, of the extended model, of an answer
QUESTION = "Who sharpened the feathers?"
SMALL = {
    "deepspeed": None, "bf16": False, "use_cpu": True, "optim": "adamw_torch", "report_to": "none",
    "load_in_4bit": False, "lora_rank": 4, "max_seq_length": CONTEXT, "model_max_length": CONTEXT,
    "max_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1,
}  # fmt: skip


class Way(NamedTuple):
    """Folders, and what the second run printed."""

    base: Path
    extended: Path  # adapter folders
    tuned: Path
    printed: str

    @property
    def models(self) -> list[Path]:
        """The merged models."""
        return [run.with_name(f"{run.name}-merged") for run in (self.extended, self.tuned)]


def shipped(name: str) -> dict:
    return yaml.safe_load((ROOT / "train_args" / name).read_text(encoding="utf-8"))


def write_lines(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def way(train, base_folder, tmp_path_factory) -> Way:
    """Both runs and both merges."""
    folder = tmp_path_factory.mktemp("way")
    texts = write_lines(folder / "texts.jsonl", [{"text": f"{text} " * 12} for text in TEXTS])
    chats = [{"input": f"{text} " * 6 + QUESTION, "output": "Somebody did, long before."} for text in TEXTS]
    first, second = shipped("llama2-7b-32k.yaml"), shipped("llama2-7b-32k-sft.yaml")
    base = folder / second["model_name_or_path"]  # the merge's default folder, if the file is right
    first |= {"model_name_or_path": str(base_folder), "train_file": texts}
    second |= {"model_name_or_path": str(base), "train_file": write_lines(folder / "chats.jsonl", chats)}
    runs = []
    for values in (first, second):
        runs.append(folder / values["output_dir"])
        printed = finish(train({**values, **SMALL, "output_dir": str(runs[-1])}))
        assert merge("--adapter_name_or_path", runs[-1], "--dtype", "float32", "--check", "yes") == 0
    return Way(base_folder, *runs, printed)


def stock(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(2, 384, (2, CONTEXT), generator=torch.Generator().manual_seed(0))


def test_positions_are_scaled_once(way):
    """By the absolute factor: after the second step as after the first, frequencies and attention scaling too."""
    parameters = {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL, "rope_theta": 10000.0,
    }  # fmt: skip
    recorded = {"rope_type": "yarn", "rope_factor": 8.0, "original_tokens": ORIGINAL, "context_tokens": CONTEXT}
    for run in (way.extended, way.tuned, *way.models):
        assert json.loads((run / "config.json").read_text())["rope_parameters"] == parameters
        assert {key: record(run)[key] for key in recorded} == recorded
    config = AutoConfig.from_pretrained(way.base)
    config.rope_parameters, config.max_position_embeddings = parameters, CONTEXT
    expected, attention_scaling = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    for folder in way.models:
        assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == CONTEXT
        rotary = stock(folder).model.rotary_emb
        assert torch.equal(rotary.inv_freq, expected)
        assert rotary.attention_scaling == attention_scaling
    assert not torch.equal(stock(way.base).model.rotary_emb.inv_freq, expected)
    assert "warning" not in way.printed


def test_the_last_model_is_stock_transformers_with_both_adapters(way, ids):
    """The second adapter on the merged first one, by PEFT; both have changed what they were trained on."""
    first, last = map(stock, way.models)
    found, extended = logits(last, ids), logits(first, ids)
    assert_close(found, logits(PeftModel.from_pretrained(first, way.tuned), ids), atol=1e-4, rtol=1e-4)
    base = stock(way.base, config=AutoConfig.from_pretrained(way.extended))
    untrained = logits(base, ids)
    assert_close(extended, logits(PeftModel.from_pretrained(base, way.extended), ids), atol=1e-4, rtol=1e-4)
    assert (found - extended).abs().mean() > 1e-2
    assert (extended - untrained).abs().mean() > 1e-2
    names = [load_file(folder / "model.safetensors").keys() for folder in (way.base, way.models[1])]
    assert names[0] == names[1]


def test_the_template_is_kept(way):
    """A pretraining run has none; the chats' is in the record, for chat.py, and in the folder, for servers."""
    first, last = way.models
    assert record(first)["template"] is None
    assert AutoTokenizer.from_pretrained(first).chat_template is None
    assert record(last)["template"] == record(way.tuned)["template"] == "vicuna"
    assert AutoTokenizer.from_pretrained(last).chat_template == (
        ROOT / "script/inference/vicuna.jinja"
    ).read_text(encoding="utf-8")  # fmt: skip


def test_chat_about_a_document_of_the_full_length(way, run_program, tmp_path):
    """Document, question and answer fill the context to its last token; greedy, as stock transformers answers."""
    _, last = way.models
    tokenizer = AutoTokenizer.from_pretrained(last)

    def prompt(document: str) -> torch.Tensor:
        messages = [{"role": "user", "content": f"{document}\n\n{QUESTION}"}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]

    document = " ".join(TEXTS * 3)
    while prompt(document).shape[1] > CONTEXT - NEW:
        document = document[:-1].rstrip()
    inputs = prompt(document)
    assert inputs.shape[1] == CONTEXT - NEW
    assert len(tokenizer(document).input_ids) > 2 * ORIGINAL
    (tmp_path / "book.txt").write_text(document, encoding="utf-8")
    stdin = f"/file {tmp_path / 'book.txt'}\n{QUESTION}\n/save {tmp_path / 'chat.jsonl'}\n".encode()
    words = ["--model_name_or_path", last, "--do_sample", "false", "--max_new_tokens", NEW]
    done = run_program("script/inference/chat.py", *words, stdin=stdin)
    assert done.status == 0, done.err
    assert "chat template: vicuna" in done.err
    generated = stock(last).generate(inputs, max_new_tokens=NEW, do_sample=False)
    expected = tokenizer.decode(generated[0, inputs.shape[1] :], skip_special_tokens=True).strip()
    question, answer = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert question["content"] == f"{document}\n\n{QUESTION}"
    assert answer["content"].strip() == expected != ""
    longer = f"/file {tmp_path / 'longer.txt'}\n{QUESTION}\n".encode()
    (tmp_path / "longer.txt").write_text(f"{document} {document}", encoding="utf-8")
    refused = run_program("script/inference/chat.py", *words, stdin=longer)
    assert refused.status == 1
    assert "the prompt has" in refused.err


def test_the_last_card_tells_both_steps(way):
    card = (way.models[1] / "README.md").read_text(encoding="utf-8")
    first, base = way.models[0].name, Path(way.base).name
    assert f"A language model with a context of {CONTEXT} tokens: `{first}` with a " in card
    assert f"`{first}` was made by the same method from `{base}`. The original context is {ORIGINAL} tokens." in card
    assert "| training data | chats, template `vicuna`: `chats.jsonl` |" in card
    (python,) = re.findall(r"```python\n(.*?)```", card, re.S)
    exec(python.replace("MODEL", str(way.models[1])), names := {})
    asked, _ = encode_chat(names["tokenizer"], [("Hello", None)])
    assert names["inputs"]["input_ids"].tolist() == [asked]
    assert names["model"].config.max_position_embeddings == CONTEXT
