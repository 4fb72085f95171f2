"""Which models are evaluated? Parsing, and what is refused before anything is loaded."""

import logging

import pytest
from transformers import MistralConfig, MistralForCausalLM

from component.error import UserError
from component.evaluate.model_spec import (
    ModelSpec,
    check_evaluator,
    check_model_spec,
    describe_model,
    load_model_spec,
    local_tokens,
    mind_context,
    parse_evaluator,
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
def test_parsing(text, expected):
    assert parse_model_spec(text) == expected


@pytest.mark.parametrize("text", ["models/llama", "=models/llama", "base=", "base=models/llama:", "base=:adapter", ""])
def test_parse_errors(text):
    with pytest.raises(UserError, match=r"--compare: .*use NAME=MODEL"):
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


def test_names_must_differ():
    with pytest.raises(UserError, match=r"--compare: base names 2 models"):
        parse_model_specs(["base=a", "other=b", "base=c"])


def test_an_evaluator_is_a_name_or_a_model(base_folder, adapter_folder):
    compared = parse_model_specs([f"base={base_folder}", f"ours={adapter_folder}"])
    assert parse_evaluator("ours", compared) is compared[1]
    flag = "--evaluator"
    for text, expected in (
        (str(adapter_folder), ModelSpec(None, None, str(adapter_folder), None, flag)),
        (f"{base_folder}@128", ModelSpec(None, str(base_folder), None, 128, flag)),
        (f"{base_folder}:{adapter_folder}", ModelSpec(None, str(base_folder), str(adapter_folder), None, flag)),
        ("owner/model", ModelSpec(None, "owner/model", None, None, flag)),
    ):
        found = parse_evaluator(text, compared)
        assert found == expected
        assert str(found) == text
        assert found.field == found.adapter_field == "--evaluator"
    for text in ("", "x:", "x:@128"):
        with pytest.raises(UserError, match=r"^--evaluator: .*use MODEL or MODEL:ADAPTER"):
            parse_evaluator(text, compared)


def test_folders_are_written_with_absolute_paths(base_folder, monkeypatch):
    monkeypatch.chdir(base_folder.parent)
    assert str(ModelSpec(None, base_folder.name, "owner/adapter", None)) == f"{base_folder}:owner/adapter"


def test_the_context_of_an_evaluator(base_folder, adapter_folder, tmp_path):
    (tmp_path / "tokens.bin").write_bytes(bytes(64))
    for text, context in ((str(base_folder), 64), (f"{base_folder}@100", 128), (str(adapter_folder), 128)):
        evaluator = parse_evaluator(text, [])
        check_evaluator(evaluator, [evaluator], str(tmp_path / "tokens.bin"), context)
        with pytest.raises(UserError, match=f"context of {context} tokens, but windows have {context + 1};"):
            check_evaluator(evaluator, [evaluator], str(tmp_path / "tokens.bin"), context + 1)


@pytest.mark.parametrize("name", [None, "mine"])
def test_messages_name_the_flag(name, tmp_path):
    with pytest.raises(UserError, match=r"^base_model: " if name is None else r"^--compare mine: "):
        check_model_spec(ModelSpec(name, "/no/such/model", None, None), str(tmp_path / "t.bin"))
    with pytest.raises(UserError, match=r"^peft_model: " if name is None else r"^--compare mine: "):
        check_model_spec(ModelSpec(name, None, "/no/such/adapter", None), str(tmp_path / "t.bin"))


def test_what_a_result_records_about_its_model(base_folder):
    model = load_model_spec(ModelSpec("x", str(base_folder), None, 128), load_in_4bit=False, dtype="bfloat16")
    assert describe_model(model, load_in_4bit=False) == {
        "weights": "bfloat16",
        "dtype": "bfloat16",
        "attention": "full (sdpa)",
        "rope_type": "linear",
        "rope_factor": 2.0,
        "rope_theta": 10000.0,
        "context_tokens": 128,
    }
    assert describe_model(model, load_in_4bit=True)["weights"] == "nf4"


def test_attention_that_is_not_full_is_not_called_so():
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    for window, kind in ((32, "mistral's own (sdpa)"), (64, "full (sdpa)"), (None, "full (sdpa)")):
        config = MistralConfig(
            **shape,
            num_hidden_layers=1,
            num_key_value_heads=1,
            max_position_embeddings=64,
            sliding_window=window,
        )
        assert describe_model(MistralForCausalLM(config), load_in_4bit=False)["attention"] == kind


def test_lengths_beyond_the_context(tiny_llama_config, capsys):
    library = logging.getLogger("transformers.generation.stopping_criteria")
    logging.getLogger("transformers").setLevel(logging.WARNING)
    assert library.isEnabledFor(logging.WARNING)
    mind_context(tiny_llama_config, 64)
    assert not library.isEnabledFor(logging.WARNING)
    assert capsys.readouterr().err == ""
    mind_context(tiny_llama_config, 65)
    assert capsys.readouterr().err == "warning: --lengths: 65 tokens are beyond the model's context of 64\n"


def test_k22_a_file_of_tokens_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(tmp_path / name)

    monkeypatch.setattr("component.evaluate.model_spec.hf_hub_download", download)
    found = local_tokens("YeungNLP/LongQLoRA-Dataset/PG19-validation.bin")
    assert found == str(tmp_path / "PG19-validation.bin")
    names = ("PG19-validation.bin", "PG19-validation.bin.json")
    assert asked == [("YeungNLP/LongQLoRA-Dataset", name, "dataset") for name in names]


@pytest.mark.parametrize("source", ["none.bin", "/no/file.bin", "./a/b/c.bin", "owner/dataset", "data/x/none.bin"])
def test_k21_a_mistyped_file_is_not_asked_of_the_hub(source, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("component.evaluate.model_spec.hf_hub_download", None)
    with pytest.raises(UserError, match=f"--data_path: there is no file {source}; name a .bin file of token ids, or"):
        local_tokens(source)


def test_a_local_file_of_tokens(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"12")
    assert local_tokens(str(tmp_path / "a.bin")) == str(tmp_path / "a.bin")
