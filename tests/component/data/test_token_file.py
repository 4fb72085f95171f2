"""What is a file of tokens? Its bytes, its index, and everything that may disagree."""

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import (
    PreTrainedTokenizerFast,
)

from component.data.token_file import check_tokenizer, index_path, read_index, read_tokens, write_tokens
from component.error import UserError
from component.tokenizer import tokenizer_hash
from tests.words import word_tokenizer

DOCUMENTS = [[3, 4], [], [5, 6, 7]]


def write(path, **options):
    return write_tokens(path, iter(DOCUMENTS), word_tokenizer(), name="words", **options)


@pytest.mark.parametrize(
    ("bos", "eos", "tokens", "offsets"),
    [
        ("each", "each", [0, 3, 4, 1, 0, 1, 0, 5, 6, 7, 1], [0, 4, 6]),
        ("first", "each", [0, 3, 4, 1, 1, 5, 6, 7, 1], [0, 4, 5]),
        ("none", "each", [3, 4, 1, 1, 5, 6, 7, 1], [0, 3, 4]),
        ("each", "none", [0, 3, 4, 0, 0, 5, 6, 7], [0, 3, 4]),
        ("none", "none", [3, 4, 5, 6, 7], [0, 2, 2]),
    ],
)
def test_tokens_and_index(tmp_path, bos, eos, tokens, offsets):
    path = tmp_path / "t.bin"
    origin = {"sources": ["a.jsonl"], "command": "the command", "versions": {"numpy": "2"}}
    index = write(path, bos=bos, eos=eos, **origin)
    assert np.fromfile(path, dtype="<u2").tolist() == tokens
    assert json.loads((tmp_path / "t.bin.json").read_text()) == {
        "format": 1,
        "dtype": "uint16",
        "tokens": len(tokens),
        "documents": 3,
        "offsets": offsets,
        "tokenizer": {"name": "words", "vocab_size": 8, "sha256": tokenizer_hash(word_tokenizer())},
        "bos": bos,
        "eos": eos,
        **origin,
        "date": str(date.today()),
    }
    assert read_index(path) == index
    assert read_tokens(str(path), 8).tolist() == tokens
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.bin", "t.bin.json"]


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    tokenizer = word_tokenizer(" ".join(f"w{number}" for number in range(65_533)))
    write_tokens(tmp_path / "t.bin", [[65_535]], tokenizer, name="large", bos="none")
    assert np.fromfile(tmp_path / "t.bin", dtype="<u4").tolist() == [65_535, 1]
    # a model may have a row or two more or less than its tokenizer: the index knows what was written
    assert read_tokens(str(tmp_path / "t.bin"), 70_000).tolist() == [65_535, 1]
    assert read_index(tmp_path / "t.bin").dtype == "uint32"


@pytest.mark.parametrize(("words", "dtype"), [(65_532, "uint16"), (65_533, "uint32")])
def test_the_largest_vocabulary_of_two_bytes(tmp_path, words, dtype):
    tokenizer = word_tokenizer(" ".join(f"w{number}" for number in range(words)))
    index = write_tokens(tmp_path / "t.bin", [[len(tokenizer) - 1]], tokenizer, name="t", bos="none", eos="none")
    assert (index.dtype, read_tokens(str(tmp_path / "t.bin"), len(tokenizer)).tolist()) == (dtype, [words + 2])


def test_ids_with_gaps(tmp_path, tokenizer):
    large = changed(tokenizer, lambda told: told["model"]["vocab"].update({"far away": 70_000}))
    assert len(large) < 70_000
    write_tokens(tmp_path / "t.bin", [[70_000]], large, name="gaps", bos="none", eos="none")
    assert read_tokens(str(tmp_path / "t.bin"), 70_001).tolist() == [70_000]


@pytest.mark.parametrize("file", ["t.bin", "t.bin.json"])
def test_tokens_never_stand_beside_another_index(tmp_path, monkeypatch, file):
    path, replace = tmp_path / "t.bin", Path.replace
    write(path)

    def killed_before(self, target):
        if target.name == file:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed_before)
    with pytest.raises(KeyboardInterrupt):
        write_tokens(path, [[3]], word_tokenizer(), name="words", overwrite=True)
    assert not path.exists()


def test_no_index(tmp_path):
    np.array([1, 2], dtype=np.uint16).tofile(tmp_path / "t.bin")
    assert read_index(tmp_path / "t.bin") is None
    assert read_tokens(str(tmp_path / "t.bin"), 8).tolist() == [1, 2]


DAMAGES = {
    "no JSON": (lambda index: "{", "damaged (JSONDecodeError"),
    "no object": (lambda index: [], "damaged (TypeError"),
    "another format": (lambda index: index | {"format": 2}, "format 2, but this version reads 1; create it again"),
    "no dtype": (lambda index: {key: index[key] for key in index if key != "dtype"}, "damaged (TypeError"),
    "unknown dtype": (lambda index: index | {"dtype": "int8"}, "dtype 'int8'"),
    "unknown bos": (lambda index: index | {"bos": "some"}, "bos 'some'"),
    "an offset less": (lambda index: index | {"offsets": [0, 4]}, "2 offsets for 3 documents"),
    "offsets that go back": (lambda index: index | {"offsets": [0, 6, 4]}, "offsets that decrease"),
    "offsets beyond the end": (lambda index: index | {"offsets": [0, 4, 12]}, "offsets that decrease, or exceed"),
    "not from the start": (lambda index: index | {"offsets": [1, 4, 6]}, "the first at [1]"),
    "no hash": (lambda index: index | {"tokenizer": {"name": "words"}}, "damaged (KeyError"),
    "endless offsets": (lambda index: index | {"offsets": [0, 2**70, 6]}, "damaged (OverflowError"),
    "another size": (
        lambda index: index | {"tokens": 12},
        "has 22 bytes, but its index t.bin.json is of 12 uint16",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_index_is_refused(tmp_path, name):
    path, file = tmp_path / "t.bin", tmp_path / "t.bin.json"
    write(path)
    spoil, message = DAMAGES[name]
    spoilt = spoil(json.loads(file.read_text()))
    file.write_text(spoilt if isinstance(spoilt, str) else json.dumps(spoilt))
    for read in (read_index, lambda path: read_tokens(str(path), 8)):
        with pytest.raises(UserError) as refusal:
            read(path)
        assert message in str(refusal.value)
        assert str(path) in str(refusal.value)


def test_an_existing_file_stays(tmp_path):
    path = tmp_path / "t.bin"
    write(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"t\.bin exists; name another file, or --overwrite it"):
        write_tokens(path, [[3]], word_tokenizer(), name="words")
    assert path.read_bytes() == before
    assert write_tokens(path, [[3]], word_tokenizer(), name="words", overwrite=True).tokens == 3
    assert read_index(path).tokens == 3


def failing():
    yield [3, 4]
    raise UserError("the input ended")


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="the input ended"):
        write_tokens(tmp_path / "t.bin", failing(), word_tokenizer(), name="words")
    with pytest.raises(UserError, match="no document to write"):
        write_tokens(tmp_path / "t.bin", [], word_tokenizer(), name="words")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flag", "value"), [("bos", "all"), ("eos", "first")])
def test_an_unknown_setting(tmp_path, flag, value):
    with pytest.raises(UserError, match=f"--{flag}: '{value}' is not one of each, "):
        write(tmp_path / "t.bin", **{flag: value})


def test_a_tokenizer_without_the_token_asked_for(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="--bos: first, but the tokenizer has no such token; use --bos none"):
        write_tokens(tmp_path / "t.bin", [[3]], tokenizer, name="words", bos="first")
    assert write_tokens(tmp_path / "t.bin", [[3]], tokenizer, name="words", bos="none").tokens == 2


def changed(tokenizer: PreTrainedTokenizerFast, change) -> PreTrainedTokenizerFast:
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    change(told)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)), bos_token="<s>", eos_token="</s>"
    )


def test_tokens_of_another_tokenizer_are_refused(tmp_path, tokenizer):
    index = write(tmp_path / "t.bin")
    check_tokenizer(index, word_tokenizer(), tmp_path / "t.bin")
    with pytest.raises(UserError) as refusal:
        check_tokenizer(index, tokenizer, tmp_path / "t.bin")
    for part in (str(tmp_path / "t.bin"), "words (8 tokens)", "384 tokens", "tokenize_bin.py"):
        assert part in str(refusal.value)


class TestReadTokens:
    def test_uint16(self, tmp_path):
        np.array([0, 5, 31999, 2], dtype=np.uint16).tofile(tmp_path / "t.bin")
        tokens = read_tokens(str(tmp_path / "t.bin"), 32000)
        assert tokens.tolist() == [0, 5, 31999, 2]
        assert isinstance(tokens, np.memmap)

    def test_uint32_for_a_large_vocabulary(self, tmp_path):
        np.array([0, 128255, 70000], dtype=np.uint32).tofile(tmp_path / "t.bin")
        assert read_tokens(str(tmp_path / "t.bin"), 128256).tolist() == [0, 128255, 70000]

    @pytest.mark.parametrize(("vocab_size", "item"), [(32000, 2), (65535, 2), (65537, 4), (128256, 4)])
    def test_bytes_per_token(self, vocab_size, item, tmp_path):
        (tmp_path / "t.bin").write_bytes(bytes(8))
        assert len(read_tokens(str(tmp_path / "t.bin"), vocab_size)) == 8 // item

    def test_a_file_of_uint16_for_a_large_vocabulary_is_refused(self, tmp_path):
        np.array([5, 6, 7], dtype=np.uint16).tofile(tmp_path / "t.bin")
        with pytest.raises(UserError, match=r"data_path: .*t\.bin has 6 bytes, not a multiple of a uint32"):
            read_tokens(str(tmp_path / "t.bin"), 128256)

    def test_the_first_id_beyond_the_vocabulary_is_named(self, tmp_path):
        np.array([5, 384, 900], dtype=np.uint16).tofile(tmp_path / "t.bin")
        with pytest.raises(UserError, match=r"token 1 of .*t\.bin is 384, but the model has 384"):
            read_tokens(str(tmp_path / "t.bin"), 384)


def token_bytes(dtype: str, count: int = 64) -> bytes:
    return np.array([1 + 7 * n % 300 for n in range(count)], dtype=dtype).tobytes()


@pytest.mark.parametrize(
    ("content", "vocab_size", "kind"),
    [
        (token_bytes("int32"), 4096, "32-bit integers, not like uint16"),
        (token_bytes("uint32"), 4096, "32-bit integers, not like uint16"),
        (token_bytes("int64"), 4096, "64-bit integers, not like uint16"),
        (token_bytes("int64"), 128256, "64-bit integers, not like uint32"),
        (token_bytes("uint16"), 2**31, "16-bit integers, not like uint32"),
        (b"\x93NUMPY" + token_bytes("uint16"), 65000, "a NumPy .npy file"),
        (b"PK\x03\x04" + token_bytes("uint16"), 65000, "a zip archive"),
        (b'{"text": "abcdefghijklmnopqrstuvwxyz0"}\n', 65000, "JSON"),
    ],
)
def test_a_file_of_another_type_is_refused(tmp_path, content, vocab_size, kind):
    """K3: int32 ids read as uint16 were measured as perplexity 42,018, and trained on."""
    file = tmp_path / "tokens.bin"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"data_path: .*tokens.bin looks like {kind}"):
        read_tokens(str(file), vocab_size)


@pytest.mark.parametrize(("dtype", "vocab_size"), [("uint16", 4096), ("uint32", 128256)])
def test_files_of_the_right_type_are_read(tmp_path, dtype, vocab_size):
    file = tmp_path / "tokens.bin"
    file.write_bytes(token_bytes(dtype))
    assert read_tokens(str(file), vocab_size).tolist() == [1 + 7 * n % 300 for n in range(64)]
    few = np.array([5, 0, 7, 0], dtype=dtype)
    file.write_bytes(few.tobytes())
    assert read_tokens(str(file), vocab_size).tolist() == few.tolist()
    few = np.zeros(15, dtype=dtype)
    file.write_bytes(few.tobytes())
    assert read_tokens(str(file), vocab_size).tolist() == few.tolist()


@pytest.mark.parametrize(("dtype", "vocab_size", "block"), [("uint16", 4096, 512), ("uint32", 128256, 256)])
@pytest.mark.parametrize("has_index", [False, True])
def test_blocks_of_zeros_are_refused(tmp_path, dtype, vocab_size, block, has_index):
    """A header, padding, or a download whose space was reserved before it broke off."""
    file, ids = tmp_path / "tokens.bin", np.arange(1, 4 * block + 1, dtype=dtype)

    def check(content: np.ndarray, place: int | None) -> None:
        file.write_bytes(content.tobytes())
        if has_index:
            sizes = {"dtype": dtype, "tokens": len(content), "documents": 1, "offsets": [0]}
            origin = {"format": 1, "tokenizer": {"sha256": ""}, "bos": "none", "eos": "none"}
            index_path(file).write_text(json.dumps(sizes | origin))
        if place is None:
            assert read_tokens(str(file), vocab_size).tolist() == content.tolist()
            return
        with pytest.raises(
            UserError, match=f"tokens.bin has only zeros for 1024 bytes from token {place} on: .*again"
        ):
            read_tokens(str(file), vocab_size)

    check(np.zeros(16, dtype=dtype), 0)
    check(np.zeros(10 * block, dtype=dtype), 0)
    for start in (0, block, 3 * block):
        holed = ids.copy()
        holed[start : start + block] = 0
        check(holed, start)
        holed[start + 7] = 5
        check(holed, None)
