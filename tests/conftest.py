"""Shared fixtures: a tiny grouped-query Llama and a tokenizer, built in the test process. No download, no GPU.

    python -m pytest
    python -m pytest -m slow

The first skips tests marked `slow`, and `gpu` without a GPU.
"""

import copy
import io
import logging
import os
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before importing transformers: tests must not download
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"  # tests look for "Loading weights"

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from component.adapter import add_adapter
from component.checkpoint import write_adapter, write_record
from component.rope import extend_context
from component.storage.result import library_versions

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Long before the longest of books was written, somebody had to sharpen a great many feathers.",
    "Positions are stretched, so that a longer text falls inside the range of positions the model was trained on.",
    "Half of the heads attend inside groups; the other half attend inside groups moved by half a group.",
    "«Größe», naïve café, 東京 2024: bytes that are no ASCII letters belong to texts as well.",
]


def pytest_configure(config):
    torch.set_num_threads(1)  # for tiny tensors, a second thread is slower


def pytest_collection_modifyitems(config, items):
    asked_for_slow = "slow" in config.getoption("-m")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if "slow" in item.keywords and not asked_for_slow:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))


@pytest.fixture(autouse=True)
def seeded():
    """Every test gets the same random numbers, in any order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def transformers_log_level():
    """Restore the log level of transformers, which the programs change."""
    library = logging.getLogger("transformers")
    level = library.level
    yield
    library.setLevel(level)


@pytest.fixture(scope="session")
def trained_bpe() -> Tokenizer:
    """Byte-level BPE with <s> and </s>, which prepends <s>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return bpe


@pytest.fixture
def tokenizer(trained_bpe) -> PreTrainedTokenizerFast:
    """Without a pad token, like Llama's. A new one per test."""
    return PreTrainedTokenizerFast(tokenizer_object=trained_bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def llama_config(trained_bpe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=trained_bpe.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # large enough that attention and next-token choices are not uniform
        bos_token_id=trained_bpe.token_to_id("<s>"),
        eos_token_id=trained_bpe.token_to_id("</s>"),
    )


@pytest.fixture
def tiny_llama_config(llama_config) -> LlamaConfig:
    """2 layers, 4 query and 2 key/value heads, 64 positions. A new one per test, which may change it."""
    return copy.deepcopy(llama_config)


def build_llama(config: LlamaConfig) -> LlamaForCausalLM:
    """The same fp32 weights every time; leaves the random state unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@pytest.fixture
def tiny_llama(tiny_llama_config) -> LlamaForCausalLM:
    return build_llama(tiny_llama_config).eval()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, llama_config, trained_bpe):
    """A base model on disk: weights, config, tokenizer. Shared by all tests, read-only."""
    folder = tmp_path_factory.mktemp("base")
    build_llama(copy.deepcopy(llama_config)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=trained_bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def own_base(base_folder, tmp_path) -> Path:
    """A copy of the base, to modify."""
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory, base_folder) -> Path:
    """A LongQLoRA adapter on `base_folder`, extended to 128 tokens, that changes the output. Read-only."""
    folder = tmp_path_factory.mktemp("adapter")
    config = AutoConfig.from_pretrained(base_folder)
    factor = extend_context(config, 128)
    model = add_adapter(LlamaForCausalLM.from_pretrained(base_folder), rank=4, alpha=8, dropout=0.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:  # zero until trained
                parameter.normal_(std=0.1)
    write_adapter(folder, model, AutoTokenizer.from_pretrained(base_folder), config)
    record = {
        "base_model": str(base_folder),
        "context_tokens": 128,
        "max_seq_length": 32,
        "rope_type": "linear",
        "rope_factor": factor,
        "group_size": 8,
        "steps": 1,
        "trained_tokens": 32,
        "versions": library_versions(),
    }
    write_record(folder, record)
    return folder


@dataclass
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Cache tokenized samples in the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def run_program(own_cache, monkeypatch, capsys):
    """Runs a program of this repository in this process, on the CPU. Returns its exit status and output.

    Exceptions other than SystemExit propagate: a user would see a traceback.
    """
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(program: str, *words: object, stdin: bytes = b"") -> Outcome:
        file = ROOT / program
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, words)])
        monkeypatch.setattr(sys, "path", [str(file.parent), *sys.path])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        status = 0
        # RANK as under a launcher; without LOCAL_RANK, no process group is created
        with mock.patch.dict(os.environ, {"RANK": "0"}):
            os.environ.pop("LOCAL_RANK", None)
            try:
                runpy.run_path(str(file), run_name="__main__")
            except SystemExit as end:
                status = end.code or 0
            finally:
                unset_hf_deepspeed_config()
                AcceleratorState._reset_state(reset_partial_state=True)
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def prompts_seen(monkeypatch):
    """The prompts that a program passes to the model; the answer to each is "An answer."."""
    seen = []

    def answer(model, tokenizer, prompt_ids, flags, cache):
        seen.append(prompt_ids)
        return "An answer."

    monkeypatch.setattr("component.inference.generate.stream_generation", answer)
    return seen
