"""What a card says about records of all kinds, also those of strangers."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from component.card.result import Results
from component.card.text import card_text
from tests.conftest import ROOT

HUB = "NousResearch/Llama-2-7b-hf"
ARGUMENTS = {
    "sft": False, "train_file": "/data/books.jsonl", "full_attention_ratio": 0.1, "lora_rank": 64, "lora_alpha": 16.0,
    "target_modules": None, "train_embedding": False, "train_norm": False, "load_in_4bit": True,
}  # fmt: skip
RECORD = {
    "base_model": HUB, "context_tokens": 128, "max_seq_length": 128, "rope_type": "linear", "rope_factor": 2.0,
    "rope_theta": 10000.0, "template": None, "group_size": 32, "arguments": ARGUMENTS, "original_tokens": 64,
    "versions": {"torch": "2.13.0"}, "steps": 1000, "trained_tokens": 131072000,
    "distribution": {"samples_per_step": 8},
}  # fmt: skip
MERGED = {"merged_from": "/home/me/run", "dtype": "float16", "base_weights": "fp16"}


@pytest.fixture
def card(adapter_folder, tmp_path):
    """card(record, name) -> its text, with a config that is scaled linearly from 64 to 128 tokens."""
    folder = Path(shutil.copytree(adapter_folder, tmp_path / "model"))

    def make(record: dict, name: str = "model") -> str:
        (folder / "longqlora.json").write_text(json.dumps(record))
        return card_text(folder, name, Results())

    return make


def metadata(text: str) -> dict:
    return ModelCard(text).data.to_dict()


def test_front_matter(card):
    common = {"base_model": HUB, "pipeline_tag": "text-generation"}
    assert metadata(card(RECORD)) == {
        **common, "library_name": "peft", "tags": ["longqlora", "long-context", "lora"],
    }  # fmt: skip
    assert metadata(card(RECORD | MERGED)) == {
        **common, "library_name": "transformers", "tags": ["longqlora", "long-context"],
    }  # fmt: skip


def test_recipe(card):
    text = card(RECORD)
    for row in (
        "| context | 128 tokens, originally 64 |",
        "| positions | `linear`, factor 2, rope_theta 10000 |",
        "| training data | texts: `books.jsonl` |",
        "| training samples | up to 128 tokens |",
        "| attention in training | shift short attention (S2-Attn), groups of 32 tokens; full attention in the last "
        "10 % of the steps |",
        "| LoRA | rank 64, alpha 16, on all linear layers but lm_head |",
        "| base weights in training | NF4 |",
        "| steps | 1000, each of 8 samples |",
        "| tokens trained | 131,072,000 |",
        "| versions | `torch 2.13.0` |",
    ):
        assert f"\n{row}\n" in text


def test_another_recipe(card):
    changed = {"sft": True, "target_modules": "q_proj,v_proj", "train_embedding": True, "train_norm": True,
               "load_in_4bit": False, "position_skipping": True, "frozen_matmul": "fp8"}  # fmt: skip
    text = card({**RECORD, "arguments": ARGUMENTS | changed, "template": "vicuna", "group_size": None})
    for row in (
        "| training data | chats, template `vicuna`: `books.jsonl` |",
        "| training samples | up to 128 tokens, with skipped positions (PoSE) |",
        "| attention in training | full |",
        "| LoRA | rank 64, alpha 16, on `q_proj,v_proj`; embeddings and norms trained in full |",
        "| base weights in training | not quantized, multiplied in FP8 (e4m3) |",
    ):
        assert f"\n{row}\n" in text
    assert "belongs to training alone" not in text
    backward = card({**RECORD, "arguments": ARGUMENTS | {"frozen_matmul": "fp8_backward"}})
    assert "| base weights in training | NF4, gradients of activations in FP8 (e4m3) |" in backward


def test_a_raised_base_frequency(card):
    text = card({**RECORD, "rope_type": "theta", "rope_factor": 2.0, "rope_theta": 50000.0, "context_tokens": 120})
    assert "| positions | unscaled, with a raised base frequency, rope_theta 50000 |" in text
    assert "for a context of 120 tokens" in text


def test_another_projects_adapter(card):
    """Only what is known of it is said."""
    text = card({"base_model": HUB, "context_tokens": 128, "rope_type": "linear", "rope_factor": 2.0} | MERGED)
    recipe = text.partition("## Recipe\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    assert [row.split(" | ")[0] for row in recipe] == ["| context", "| positions", "| merge"]


def test_a_line_of_bases(card, tmp_path):
    """An adapter fits the last of them alone; the merged model derives from the one on the hub too."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "longqlora.json").write_text(json.dumps(RECORD | MERGED))
    (tmp_path / "first" / "README.md").write_text(card(RECORD | MERGED).replace("---\n", "---\nlicense: llama2\n", 1))
    second = {**RECORD, "base_model": str(tmp_path / "first")}
    text = card(second | MERGED)
    assert metadata(text)["base_model"] == HUB
    assert f"`first` was made by the same method from [{HUB}](https://huggingface.co/{HUB})." in text
    assert metadata(text)["license"] == "llama2"
    assert "the card of `first` states `llama2`" in text
    assert "base_model" not in metadata(card(second))
    assert str(tmp_path) not in text


def test_no_path_of_this_machine(card):
    """The base's, the data's, and the adapter's: names only."""
    here = {"base_model": "/home/me/models/base", "arguments": ARGUMENTS | {"train_file": "/home/me/books.jsonl"}}
    for text in (card(RECORD | here), card(RECORD | here | MERGED)):
        assert "/home" not in text
        assert "`base`" in text
        assert "`books.jsonl`" in text


def test_no_license_is_invented(card):
    text = card(RECORD)
    assert "license" not in metadata(text)
    assert "it is not known here" in text


EVIL = [
    'x"\n---\nlicense: mit\n---\n# Gotcha',
    "x'\r\n---\r\nlicense: mit",
    "x: {a: [b\n...\n--- !!python/object",
    "`</code><script>| --- |\n\n## Gotcha",
    "[a](https://evil.example)\u2028---\u2028",
    "/home/me/secret/x`\n- item",
]


@pytest.mark.parametrize("evil", EVIL)
def test_names_of_others_break_out_of_nothing(card, evil):
    """Each text field of a record, and the title: the same front matter and sections, and no new line."""
    plain = card(RECORD | MERGED, "model")
    fields = ["rope_type", "template", "base_weights", "dtype", "merged_from", "base_model", "versions"]
    records = [{**RECORD, **MERGED, field: {evil: evil} if field == "versions" else evil} for field in fields]
    records += [{**RECORD, **MERGED, "arguments": ARGUMENTS | {key: evil}} for key in ARGUMENTS]
    records += [{**RECORD, **MERGED, "arguments": ARGUMENTS | {"sft": True}, "template": evil}]
    for record in records:
        text = card(record, evil)
        found, expected = metadata(text), metadata(plain)
        assert {**expected, "base_model": found.get("base_model")} == {"base_model": None} | found
        assert found.get("base_model") in (HUB, None)
        headings = [line for line in text.splitlines() if line.startswith("#")]
        assert headings[1:] == [line for line in plain.splitlines() if line.startswith("#")][1:]
        assert text.splitlines().count("---") == 2
        assert "<script" not in text


@pytest.mark.parametrize("value", [None, -1, 1e400, True, [], {}, "5", 2**70])
@pytest.mark.parametrize("key", sorted(RECORD | MERGED))
def test_any_record_makes_a_card(card, key, value):
    """Types that a stranger's record may have."""
    assert metadata(card({**RECORD, **MERGED, key: value}))["library_name"] == "transformers"


def test_commands_name_what_exists(card):
    assert (ROOT / "script" / "merge_lora.py").is_file()
    assert "python script/merge_lora.py " in card(RECORD)
