"""A tokenizer: how it is loaded, told apart by its hash, and saved."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers
from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from component.data.token_file import write_tokens
from component.error import UserError
from component.evaluate.model_spec import (
    ModelSpec,
    check_model_spec,
)
from component.tokenizer import any_pad_id, load_tokenizer, save_tokenizer, tokenizer_hash, tokenizer_in


def test_tokenizer_keeps_its_vocabulary(base_folder):
    ours, stock = load_tokenizer(str(base_folder), 8192), AutoTokenizer.from_pretrained(base_folder)
    assert ours.get_vocab() == stock.get_vocab()
    assert ours.pad_token_id is None
    assert ours.padding_side == "right"
    assert ours.model_max_length == 8192
    assert any_pad_id(ours) == ours.eos_token_id
    ours.pad_token = "the"
    assert any_pad_id(ours) == ours.convert_tokens_to_ids("the")


def test_long_texts_cause_no_warning(base_folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    ids = load_tokenizer(str(base_folder), 4)("The dog is here and there. " * 9).input_ids
    assert len(ids) > 4
    assert not caplog.records
    AutoTokenizer.from_pretrained(base_folder, model_max_length=4)("The dog is here and there. " * 9)
    assert caplog.records, "stock transformers warns"


def test_a_tokenizer_without_an_end(own_base, trained_bpe):
    PreTrainedTokenizerFast(tokenizer_object=trained_bpe, bos_token="<s>").save_pretrained(own_base)
    with pytest.raises(UserError, match="end-of-sequence"):
        load_tokenizer(str(own_base))


@pytest.mark.parametrize("damage", ["cut", "noise", "gone"])
def test_a_tokenizer_that_is_none(own_base, damage):
    file = own_base / "tokenizer.json"
    if damage == "cut":
        os.truncate(file, 1000)
    elif damage == "noise":
        file.write_text("{}")
    else:
        file.unlink()
        (own_base / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="model_name_or_path") as error:
        load_tokenizer(str(own_base))
    assert str(own_base) in str(error.value)
    with pytest.raises(UserError, match=r"^--tokenizer: "):
        load_tokenizer(str(own_base), field="--tokenizer")


def test_a_hash_is_of_what_decides_ids(base_folder, tmp_path, tokenizer):
    known = tokenizer_hash(AutoTokenizer.from_pretrained(base_folder))
    assert known == tokenizer_hash(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == known, "the folder is no part of it"
    tokenizer("a", truncation=True, max_length=1)
    tokenizer.pad_token = "</s>"
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)
    assert tokenizer_hash(tokenizer) == known, "nor are truncation and padding"


@pytest.mark.parametrize("legacy", [True, False])
def test_a_hash_survives_saving_and_loading(tmp_path, legacy):
    """transformers' LlamaTokenizer forgets `legacy`, and with it how it prepends."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    first = LlamaTokenizer(vocab=vocab, merges=[("▁", "a")], legacy=legacy)
    first.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert first("a a b").input_ids == again("a a b").input_ids
    assert tokenizer_hash(first) == tokenizer_hash(again)


def changed(tokenizer: PreTrainedTokenizerFast, change) -> PreTrainedTokenizerFast:
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    change(told)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)), bos_token="<s>", eos_token="</s>"
    )


def test_another_tokenizer_has_another_hash(tokenizer):
    known = tokenizer_hash(tokenizer)
    assert tokenizer_hash(changed(tokenizer, lambda told: None)) == known

    def swap_two(told):
        ids = told["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]

    lowercase = json.loads(normalizers.Lowercase().__getstate__())
    changes = [swap_two, lambda told: told["model"]["merges"].pop(), lambda told: told.update(normalizer=lowercase)]
    hashes = {tokenizer_hash(changed(tokenizer, change)) for change in changes}
    assert len(hashes | {known}) == 4
    tokenizer.eos_token = "<s>"
    assert tokenizer_hash(tokenizer) != known


def test_sentencepieces_own_file_comes_along(tokenizer, tmp_path):
    for name in ("own", "base", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"pieces")
    save_tokenizer(tmp_path / "merged", tokenizer, (str(tmp_path / "own"), str(tmp_path / "base")))
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"pieces"
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in (tmp_path / "merged").iterdir()}


@pytest.fixture
def indexed(tmp_path, base_folder):
    """A file of tokens that the base's tokenizer made."""
    path = tmp_path / "t.bin"
    write_tokens(path, [[5, 6, 7], [8, 9]], AutoTokenizer.from_pretrained(base_folder), name="tiny")
    return str(path)


class TestTokenizer:
    def test_the_files(self, indexed, base_folder, adapter_folder):
        assert check_model_spec(ModelSpec(None, str(base_folder), None, None), indexed) == "the file's"
        assert check_model_spec(ModelSpec(None, None, str(adapter_folder), None), indexed) == "the file's"

    def test_another(self, indexed, tmp_path, base_folder):
        other = AutoTokenizer.from_pretrained(base_folder)
        other.add_tokens(["<other>"])
        write_tokens(tmp_path / "other.bin", [[5, 6]], other, name="other")
        with pytest.raises(UserError, match=r"other\.bin was made by the tokenizer other"):
            check_model_spec(ModelSpec(None, str(base_folder), None, None), str(tmp_path / "other.bin"))

    def test_none_beside_the_model(self, indexed, tmp_path, tiny_llama):
        tiny_llama.save_pretrained(tmp_path / "bare")
        told = check_model_spec(ModelSpec(None, str(tmp_path / "bare"), None, None), indexed)
        assert told == f"not checked: {tmp_path}/bare holds none"
        assert tokenizer_in(str(tmp_path / "bare")) is None

    def test_a_damaged_one_is_no_missing_one(self, tmp_path, tiny_llama):
        tiny_llama.save_pretrained(tmp_path / "bare")
        (tmp_path / "bare" / "tokenizer.json").write_text("{")
        with pytest.raises(UserError, match="tokenizer"):
            tokenizer_in(str(tmp_path / "bare"))

    def test_a_file_without_an_index(self, tmp_path, base_folder):
        np.array([5, 6, 7], dtype=np.uint16).tofile(tmp_path / "t.bin")
        told = check_model_spec(ModelSpec(None, str(base_folder), None, None), str(tmp_path / "t.bin"))
        assert told == "not checked: there is no index t.bin.json that says which one made the file"


# ---- what somebody else wrote


def change(folder: Path, **values) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_k16_no_code_is_carried_along(own_base, tmp_path):
    change(own_base, auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}, custom_generate="someone/code")
    save_tokenizer(tmp_path / "saved", load_tokenizer(str(own_base)), [str(own_base)])
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert not {"auto_map", "custom_generate"} & saved.keys()


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "chat_template.jinja"])
def test_k16_a_link_out_of_the_folder(own_base, tmp_path, name):
    """Its contents would be copied into every adapter and merged model."""
    (tmp_path / "secret").write_text("{}")
    (own_base / name).unlink(missing_ok=True)
    (own_base / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"{own_base}/{name} is a link to {tmp_path}/secret, outside of the folder"):
        load_tokenizer(str(own_base))


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "merges_file"])
def test_k16_files_that_a_config_names(own_base, base_folder, tmp_path, key):
    """Old configs name paths of the machine that wrote them; the folder's own files are read."""
    (tmp_path / "tokenizer.json").write_text("{}")
    change(own_base, **{key: str(tmp_path / "tokenizer.json")})
    ours, plain = load_tokenizer(str(own_base)), load_tokenizer(str(base_folder))
    assert ours("The quick").input_ids == plain("The quick").input_ids


def test_k16_versions_of_a_tokenizer_elsewhere(own_base):
    change(own_base, fast_tokenizer_files=["../../tokenizer.4.0.json"])
    with pytest.raises(UserError, match="which leads out of it"):
        load_tokenizer(str(own_base))


@pytest.mark.parametrize(
    ("key", "value"),
    [("eos_token", 5), ("chat_template", 5), ("model_max_length", "x"), ("added_tokens_decoder", 5), ("auto_map", 5),
     ("tokenizer_class", 5), ("init_inputs", 5)],
)  # fmt: skip
def test_k15_values_of_another_kind(own_base, key, value):
    change(own_base, **{key: value})
    with pytest.raises(UserError, match=f"model_name_or_path: '{own_base}' holds no usable tokenizer"):
        load_tokenizer(str(own_base))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "[]", "5"])
def test_k15_files_of_any_content(own_base, name, text):
    (own_base / name).write_text(text)
    with pytest.raises(UserError, match=name if name == "tokenizer_config.json" else "holds no usable tokenizer"):
        load_tokenizer(str(own_base))
