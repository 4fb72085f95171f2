"""Which models are measured, one after the other? Spellings, and what is refused before anything loads."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from component.data.token_file import write_tokens
from component.error import UserError
from component.evaluate.model_spec import (
    ModelSpec,
    check_model_spec,
    describe_model,
    load_model_spec,
    parse_model_spec,
    parse_model_specs,
)
from component.tokenizer import tokenizer_in


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base=models/llama", ModelSpec("base", "models/llama", None, None)),
        ("long=owner/model@32768", ModelSpec("long", "owner/model", None, 32768)),
        ("theirs=models/llama:adapters/a@8192", ModelSpec("theirs", "models/llama", "adapters/a", 8192)),
        ("a b=models/llama:owner/adapter", ModelSpec("a b", "models/llama", "owner/adapter", None)),
        ("x=run@home", ModelSpec("x", "run@home", None, None)),
        ("x=a=b", ModelSpec("x", "a=b", None, None)),
    ],
)
def test_spellings(text, expected):
    assert parse_model_spec(text) == expected


@pytest.mark.parametrize("text", ["models/llama", "=models/llama", "base=", "base=models/llama:", "base=:adapter", ""])
def test_no_spelling(text):
    with pytest.raises(UserError, match=r"--compare: .*spell it NAME=MODEL"):
        parse_model_spec(text)


def test_an_adapter_folder_stands_alone(adapter_folder):
    assert parse_model_spec(f"ours={adapter_folder}") == ModelSpec("ours", None, str(adapter_folder), None)


def test_a_folder_with_a_colon_in_its_name(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert parse_model_spec(f"x={tmp_path}/a:b").base_model == f"{tmp_path}/a:b"


def test_a_folder_with_an_at_sign_in_its_name(tmp_path):
    (tmp_path / "run@2048").mkdir()
    assert parse_model_spec(f"x={tmp_path}/run@2048") == ModelSpec("x", f"{tmp_path}/run@2048", None, None)
    assert parse_model_spec(f"x={tmp_path}/run@2048@4096") == ModelSpec("x", f"{tmp_path}/run@2048", None, 4096)


def test_names_tell_models_apart():
    with pytest.raises(UserError, match=r"--compare: base names 2 models"):
        parse_model_specs(["base=a", "other=b", "base=c"])


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


@pytest.mark.parametrize("name", [None, "mine"])
def test_messages_name_the_flag(name, tmp_path):
    with pytest.raises(UserError, match=r"^base_model: " if name is None else r"^--compare mine: "):
        check_model_spec(ModelSpec(name, "/no/such/model", None, None), str(tmp_path / "t.bin"))
    with pytest.raises(UserError, match=r"^peft_model: " if name is None else r"^--compare mine: "):
        check_model_spec(ModelSpec(name, None, "/no/such/adapter", None), str(tmp_path / "t.bin"))


def test_what_a_result_says_of_its_model(base_folder):
    model = load_model_spec(ModelSpec("x", str(base_folder), None, 128), load_in_4bit=False, dtype="bfloat16")
    assert describe_model(model, load_in_4bit=False) == {
        "weights": "bfloat16",
        "dtype": "bfloat16",
        "attention": "full (sdpa)",
        "rope_type": "linear",
        "rope_factor": 2.0,
        "context_tokens": 128,
    }
    assert describe_model(model, load_in_4bit=True)["weights"] == "nf4"
