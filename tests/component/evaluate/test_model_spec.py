"""Which models are measured, one after the other? Spellings, and what is refused before anything loads."""

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
