"""What the tests share: a tiny grouped-query Llama and a tokenizer, both made here. No download, no GPU.

    python -m pytest
    python -m pytest -m slow

The first leaves out what is marked `slow`, and `gpu` where there is none.
"""

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: a test that downloads fails

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Long before the longest of books was written, somebody had to sharpen a great many feathers.",
    "Positions are stretched, so that a longer text falls inside the range of positions the model was trained on.",
    "Half of the heads attend inside groups; the other half attend inside groups moved by half a group.",
    "«Größe», naïve café, 東京 2024: bytes that are no ASCII letters belong to texts as well.",
]


def pytest_configure(config):
    torch.set_num_threads(2)


def pytest_collection_modifyitems(config, items):
    asked_for_slow = "slow" in config.getoption("-m")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if "slow" in item.keywords and not asked_for_slow:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained_bpe() -> Tokenizer:
    """Byte-level BPE with <s> and </s>; <s> stands before every text."""
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
    """Without a pad token, as Llama's. Each test gets its own."""
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
    """2 layers, 4 query and 2 key/value heads, 64 positions. Each test gets its own, to change as it likes."""
    return copy.deepcopy(llama_config)


def build_llama(config: LlamaConfig) -> LlamaForCausalLM:
    """The same fp32 weights every time, without touching the test's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@pytest.fixture
def tiny_llama(tiny_llama_config) -> LlamaForCausalLM:
    return build_llama(tiny_llama_config).eval()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, llama_config, trained_bpe):
    """A base model as a user has it on disk: weights, config, tokenizer. Read only: every test gets the same."""
    folder = tmp_path_factory.mktemp("base")
    build_llama(copy.deepcopy(llama_config)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=trained_bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder
