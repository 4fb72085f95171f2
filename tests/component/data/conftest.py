"""What the tests of data share."""

import json

import pytest

from component.data.token_file import write_tokens
from tests.chat_words import A, B, C, D, E, word_tokenizer


@pytest.fixture
def words():
    return word_tokenizer()


@pytest.fixture
def write(tmp_path):
    def run(*records, name: str = "data.jsonl") -> str:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(file)

    return run


# --- files of tokens ---

TOKENS = [[A, B, C], [], [D], [E, A, B, C, D, E]]


@pytest.fixture
def tokens(tmp_path, words):
    def write(bos: str = "each", eos: str = "each", tokenizer=words) -> str:
        write_tokens(tmp_path / "t.bin", iter(TOKENS), tokenizer, name="words", bos=bos, eos=eos, overwrite=True)
        return str(tmp_path / "t.bin")

    return write
