"""Model cards from train.py, merge_lora.py and model_card.py: what they say, and that what they say is true."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torch.testing import assert_close

from component.rope import ROPE_TYPES
from component.storage.result import library_versions
from tests.train_run import BASIC, TRAIN_TEXTS, finish

BASE_CARD = "---\nlicense: other\nlicense_name: tiny\nlicense_link: https://example.com/LICENSE\n---\nMine.\n"
VERSIONS = ", ".join(f"{name} {version}" for name, version in library_versions().items())
ADAPTER_CARD = f"""---
library_name: peft
license: other
license_name: tiny
license_link: https://example.com/LICENSE
pipeline_tag: text-generation
tags:
- longqlora
- long-context
- lora
---

# `yarn`

A LoRA adapter for `tiny-base`, trained with [LongQLoRA](https://arxiv.org/abs/2311.04879) for a context of 192 \
tokens. The original context is 64 tokens.

## Recipe

| setting | value |
| --- | --- |
| context | 192 tokens, originally 64 |
| positions | `yarn`, factor 3, rope_theta 10000 |
| training data | texts: `train.jsonl` |
| training samples | up to 150 tokens |
| attention in training | shift short attention (S2-Attn), groups of 24 tokens; full attention in the last 25 % of \
the steps |
| LoRA | rank 4, alpha 16, on all linear layers but lm_head |
| base weights in training | not quantized |
| steps | 3, each of 4 samples |
| tokens trained | 687 |
| versions | `{VERSIONS}` |

## Evaluation

### Held-out perplexity

Held-out data of the run (`eval_file`), full attention, all tokens weighted equally: perplexity PERPLEXITY.

## Use

`ADAPTER` stands for this repository's id, or for a folder with its files, `BASE` for the base model named above.

transformers 5 with PEFT:

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

config = AutoConfig.from_pretrained("ADAPTER")  # has the scaled positions; the base's own config has not
base = AutoModelForCausalLM.from_pretrained("BASE", config=config, dtype="auto")
model = PeftModel.from_pretrained(base, "ADAPTER").eval()
tokenizer = AutoTokenizer.from_pretrained("ADAPTER")
```

`AutoPeftModelForCausalLM.from_pretrained` would load the adapter on the base without the longer context.

vLLM and llama.cpp take positions from the base's config, so do not add the adapter to the base there. Merge it \
first, in LongQLoRA's repository, and use the merged model, whose card has the commands:

```bash
python script/merge_lora.py --model_name_or_path BASE --adapter_name_or_path ADAPTER --save_path MODEL
```

## Limits

- Texts of more than 192 tokens are outside of the positions that it was made for.
- Trained on samples of up to 150 tokens: longer texts were not seen in training.
- Texts of up to 64 tokens may be predicted worse than by the model before extension.
- Shift short attention belongs to training alone: use ordinary full attention.
- What the base model gets wrong, or must not be used for, holds here too.

## License

That of the base model: the card of `tiny-base` states [`tiny`](https://example.com/LICENSE).
"""
ROWS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}  # dynamic takes no other
CONVERT = "python convert_hf_to_gguf.py MODEL --outtype f32 --outfile MODEL.gguf\n"
SET_LENGTH = (
    "PYTHONPATH=gguf-py python gguf-py/gguf/scripts/gguf_set_metadata.py --force MODEL.gguf llama.context_length 192\n"
)
SERVE = "llama-server -m MODEL.gguf -c 192\n"


@pytest.fixture(scope="module")
def base(base_folder, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(base_folder, tmp_path_factory.mktemp("bases") / "tiny-base"))
    (folder / "README.md").write_text(BASE_CARD)
    return folder


@pytest.fixture(scope="module")
def values(base, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TRAIN_TEXTS), encoding="utf-8")
    texts = {"train_file": str(file), "eval_file": str(file)}
    return {**BASIC, **texts, "model_name_or_path": str(base), "full_attention_ratio": 0.25}


@pytest.fixture(scope="module")
def runs(train, values, tmp_path_factory) -> Path:
    """A folder with adapter folders, by rope type."""
    folder = tmp_path_factory.mktemp("output")
    for rope_type in ROPE_TYPES:
        finish(train({**values, **ROWS, "rope_type": rope_type, "output_dir": str(folder / rope_type)}))
    return folder


@pytest.fixture
def own(runs, tmp_path) -> Path:
    """The yarn run, to change."""
    return Path(shutil.copytree(runs / "yarn", tmp_path / "run"))


@pytest.fixture
def merge(run_program):
    def run(adapter: Path, *words: object):
        return run_program("script/merge_lora.py", "--adapter_name_or_path", adapter, "--dtype", "float32", *words)

    return run


def written(folder: Path) -> str:
    """The card, without the line that marks it as generated."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\n<!-- generated by .*-->\n$", "", text)


def code(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.S)


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


# ---- adapter folders


def test_the_card_of_a_run(runs):
    perplexity = json.loads((runs / "yarn" / "eval_results.json").read_text())["eval_perplexity"]
    assert written(runs / "yarn") == ADAPTER_CARD.replace("PERPLEXITY", f"{perplexity:.3f}")
    for folder in runs.iterdir():
        assert "/" not in re.sub(r"https://\S+|script/merge_lora.py", "", written(folder)), "a path of this machine"
        assert not (folder / "checkpoint-3" / "README.md").exists()


def test_the_hub_reads_it(runs):
    """As far as this can be seen without a network."""
    card = ModelCard.load(runs / "yarn" / "README.md")
    expected = {
        "license": "other", "library_name": "peft", "license_name": "tiny", "pipeline_tag": "text-generation",
        "license_link": "https://example.com/LICENSE", "tags": ["longqlora", "long-context", "lora"],
    }  # fmt: skip
    assert card.data.to_dict() == expected
    assert str(card) == (runs / "yarn" / "README.md").read_text()


def test_a_resumed_run_rewrites_it(train, values, own):
    assert "| steps | 3, " in written(own)
    resumed = {"rope_type": "yarn", "output_dir": str(own), "max_steps": 4, "resume_from_checkpoint": "auto"}
    finish(train({**values, **ROWS, **resumed}))
    assert "| steps | 4, each of 4 samples |" in written(own)
    perplexity = json.loads((own / "eval_results.json").read_text())["eval_perplexity"]
    assert f"perplexity {perplexity:.3f}." in written(own)


def test_a_users_card_is_kept(train, values, own):
    """By a run that takes the folder over, which tells."""
    (own / "README.md").write_text((own / "README.md").read_text() + "My notes.\n")
    before = (own / "README.md").read_bytes()
    printed = finish(train({**values, "output_dir": str(own), "max_steps": 1, "overwrite_output_dir": True}))
    assert (own / "README.md").read_bytes() == before
    assert f"{own / 'README.md'} is kept: you wrote or changed it" in printed


# ---- merged folders


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(2, 384, (1, 192), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_what_a_merge_says_about_loading_is_true(runs, base, merge, ids, tmp_path, rope_type):
    """Its code is run, the adapter's too: the same logits at the full length. Other engines: as was measured."""
    done = merge(runs / rope_type, "--save_path", tmp_path / "model")
    assert done.status == 0, done.err
    card = written(tmp_path / "model")
    found = {}
    for name, text in (("merged", card), ("adapter", written(runs / rope_type))):
        (python,) = code(text, "python")
        python = python.replace("MODEL", str(tmp_path / "model")).replace("ADAPTER", str(runs / rope_type))
        exec(python.replace("BASE", str(base)), names := {})
        found[name] = logits(names["model"].eval(), ids)
        assert names["tokenizer"]("A feather.").input_ids
    assert_close(found["merged"], found["adapter"], atol=1e-4, rtol=1e-4)
    vllm, llama_cpp = code(card, "bash")
    assert vllm == "vllm serve MODEL --dtype float32\n"
    assert llama_cpp == CONVERT + (SET_LENGTH if rope_type == "linear" else "") + SERVE
    assert "vLLM 0.30 or newer" in card
    assert "finds the length of 192 tokens by itself" in card
    assert ("`-c` alone does not raise it" in card) == (rope_type == "linear")
    assert ("frozen as they are for texts of 192 tokens" in card) == (rope_type == "dynamic")
    assert f"| positions | `{rope_type}`, factor 3, rope_theta 10000 |" in card
    assert "| merge | into `fp16` base weights, stored in float32 |" in card
    assert ModelCard.load(tmp_path / "model" / "README.md").data.library_name == "transformers"


def test_what_replaces_a_merge(own, merge):
    """The card of the merge itself is replaced; one that was changed since is not, and nothing else either."""
    merged = own.with_name("run-merged")
    assert merge(own).status == 0
    assert merge(own, "--overwrite").status == 0
    (merged / "README.md").write_text(before := (merged / "README.md").read_text() + "Mine.\n")
    done = merge(own, "--overwrite")
    assert done.status == 1
    assert "1 files that no merge wrote, such as README.md, so it is not overwritten" in done.err
    assert (merged / "README.md").read_text() == before
    assert merge(own, "--check", "only").status == 0, "a changed card does not make the folder incomplete"


def test_an_older_merge_gets_one_with_its_config(own, merge, run_program):
    merged = own.with_name("run-merged")
    assert merge(own).status == 0
    card = (merged / "README.md").read_bytes()
    (merged / "README.md").unlink()
    words = ["--save_path", merged, "--renew_config"]
    assert run_program("script/merge_lora.py", *words).status == 0
    assert (merged / "README.md").read_bytes() == card
    (merged / "README.md").write_text("Mine.")
    assert run_program("script/merge_lora.py", *words).status == 1, "refused, as all that no merge wrote"
    assert (merged / "README.md").read_text() == "Mine."


# ---- evaluation results


def test_results_of_all_three_programs(own, merge, run_program, tmp_path, monkeypatch):
    """Named by relative and absolute paths, beside the folder; not those of the adapter, nor of other models."""
    merged = own.with_name("run-merged")
    assert merge(own).status == 0
    tokens = tmp_path / "heldout.bin"
    tokens.write_bytes(torch.randint(2, 384, (600,), dtype=torch.int16).numpy().tobytes())
    monkeypatch.chdir(tmp_path)
    window = ["--data_path", tokens, "--seq_len", 192, "--sliding_window", 192]
    measured = {
        "evaluate": ["--base_model", "run-merged", *window, "--protocol", "sliding"],
        "passkey": ["--base_model", merged, "--lengths", 150, 180, "--depths", 0.5, "--trials", 2],
        "ruler": ["--base_model", merged, "--lengths", 1700, "--samples", 1, "--tasks", "vt", "fwe"],
    }
    for name, words in measured.items():
        done = run_program(f"script/evaluate/{name}.py", *words, "--output_json", tmp_path / f"{name}.json")
        assert done.status == 0, done.err
    words = ["--base_model", own, *window, "--output_json", tmp_path / "of-the-adapter.json"]
    assert run_program("script/evaluate/evaluate.py", *words).status == 0
    done = run_program("script/model_card.py", "--folder", merged)
    assert done.status == 0, done.err
    card = written(merged)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in measured}
    perplexity = found["evaluate"]["results"][0]
    assert f"| 192 | 192 | {perplexity['windows']} | 599 | {perplexity['perplexity']:.3f} |" in card
    assert "### Perplexity of `heldout.bin`\n\nProtocol `sliding`: every token of the file scored once" in card
    assert "Weights `float32`, context of 192 tokens, attention `full (sdpa)`" in card
    shares = found["passkey"]["accuracy"][0]
    row = f"| 50 % | {100 * shares[0]:.0f} % | {100 * shares[1]:.0f} % |"
    assert f"| depth, tokens | 150 | 180 |\n| --- | --- | --- |\n{row}\n" in card
    assert "1 samples per task and length" in card
    assert "| task, tokens | 1700 |\n| --- | --- |\n| `vt` | 0.0 |\n| `fwe` | 0.0 |\n| mean | 0.0 |" in card
    assert card.count("\n### ") == 3
    assert str(tmp_path) not in card


def test_results_of_earlier_weights_are_left_out(own, run_program, tmp_path):
    os.utime(own / "eval_results.json", (1e9, 1e9))
    done = run_program("script/model_card.py", "--folder", own)
    assert done.status == 0
    assert "eval_results.json is not in the card" in done.err
    assert "No evaluation results were found" in written(own)
