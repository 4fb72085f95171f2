"""Texts to a file of tokens: document by document what the tokenizer gives, whatever the number of processes."""

import json

import numpy as np
import pytest

from component.data.token_file import read_index, read_tokens
from tests.conftest import TEXTS
from tests.outcome import refused_by_us
from tests.words import write_lines

PROGRAM = "script/data/tokenize_bin.py"


@pytest.fixture
def tokenize(run_program, base_folder, tmp_path):
    def run(*sources, output="out.bin", **flags):
        options = [word for name, value in flags.items() for word in (f"--{name}", value)]
        words = ["--tokenizer", base_folder, "--output", tmp_path / output, *options]
        return run_program(PROGRAM, "--source", *sources, *[word for word in words if word is not True])

    return run


@pytest.fixture
def texts(tmp_path):
    """300 of them, with an empty one, in two files; the last is a long one."""
    texts = [f"{number} {TEXTS[number % 5]}\n" for number in range(299)]
    first = write_lines(tmp_path / "1.jsonl", *({"text": text} for text in texts[:100]), {"text": " \n"})
    second = write_lines(tmp_path / "2.jsonl", *({"text": text} for text in texts[100:]), {"text": TEXTS[0] * 8000})
    return [first, second], [*texts, TEXTS[0] * 8000]


def test_a_file_read_back_is_its_documents(tokenize, texts, tokenizer, tmp_path, base_folder, monkeypatch):
    monkeypatch.setattr("component.corpus.tokenize.CHUNK_CHARACTERS", 1000)  # about 10 texts
    sources, expected = texts
    outcome = tokenize(*sources, num_proc=1)
    assert outcome.status == 0, outcome.err
    index, tokens = read_index(tmp_path / "out.bin"), read_tokens(str(tmp_path / "out.bin"), 384)
    assert (index.documents, index.tokens, index.dtype, index.bos, index.eos) == (
        300,
        len(tokens),
        "uint16",
        "each",
        "each",
    )
    documents = np.split(np.array(tokens), index.offsets[1:])
    for ids, text in zip(documents, expected, strict=True):
        assert ids.tolist() == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert index.tokenizer["name"] == str(base_folder)
    assert index.sources == ["1.jsonl", "2.jsonl"]
    assert f"300 documents, {len(tokens):,} tokens in uint16" in outcome.out
    tokenize(*sources, num_proc=2, output="2.bin")
    assert (tmp_path / "2.bin").read_bytes() == (tmp_path / "out.bin").read_bytes()
    told, again = (json.loads((tmp_path / f"{name}.bin.json").read_text()) for name in ("out", "2"))
    assert {**told, "command": ""} == {**again, "command": ""}


def test_special_tokens_and_the_first_documents(tokenize, texts, tokenizer, tmp_path):
    sources, expected = texts
    tokenize(*sources, bos="first", eos="none", max_documents=101)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in expected[:101]]
    tokens = [tokenizer.bos_token_id, *(token for document in ids for token in document)]
    assert read_tokens(str(tmp_path / "out.bin"), 384).tolist() == tokens
    index = read_index(tmp_path / "out.bin")
    assert index.offsets == [0, *(1 + np.cumsum([len(document) for document in ids])[:-1]).tolist()]


def test_bad_lines(tokenize, texts, tmp_path):
    (first, _), _ = texts
    with first.open("a") as file:
        file.write("bad\n")
    outcome = tokenize(first)
    assert f"1 of 102 lines skipped: {first}:102: not JSON" in outcome.out
    refused_by_us(
        tokenize(first, max_bad_fraction=0, overwrite=True), "1 of 102 lines can't be used", f"{first}:102: not JSON"
    )
    assert read_index(tmp_path / "out.bin").documents == 100, "what was there stays"


def test_what_is_refused(tokenize, texts, tmp_path):
    sources, _ = texts
    refused_by_us(
        tokenize(*sources, num_proc=0, max_documents=0), "--num_proc: 0", "--max_documents: 0; use at least 1"
    )
    (tmp_path / "out.bin").write_bytes(b"mine")
    refused_by_us(tokenize(*sources), "--output:", "out.bin exists", "--overwrite")
    assert (tmp_path / "out.bin").read_bytes() == b"mine"
    refused_by_us(
        tokenize(write_lines(tmp_path / "no.jsonl"), output="no.bin"), f"nothing to read in {tmp_path}/no.jsonl"
    )
    refused_by_us(tokenize(write_lines(tmp_path / "no.jsonl", {"text": " "}), output="no.bin"), "no document to write")
