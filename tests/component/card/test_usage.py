"""Commands for each engine; tests/end_to_end/test_card.py runs the Python code."""

import dataclasses

import pytest

from component.card.usage import Loaded, adapter_usage, merged_usage

MODEL = Loaded("linear", 8192, 4096, "float16", "llama", "NousResearch/Llama-2-7b-hf", None)


def with_(**changes) -> Loaded:
    return dataclasses.replace(MODEL, **changes)


@pytest.mark.parametrize(
    ("model_type", "key"),
    [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("unknown", None)],
)
def test_the_length_of_linear_positions_in_a_gguf_file(model_type, key):
    command = f"gguf_set_metadata.py --force MODEL.gguf {key}.context_length 8192\n"
    assert (command in merged_usage(with_(model_type=model_type))) == (key is not None)
    assert "gguf_set_metadata" not in merged_usage(with_(model_type=model_type, rope_type="yarn"))
    assert "gguf_set_metadata" not in merged_usage(with_(model_type=model_type, tokens=4096))


@pytest.mark.parametrize(
    ("dtype", "outtype"), [("float16", "f16"), ("bfloat16", "bf16"), ("float32", "f32"), ("auto", "auto")]
)
def test_dtypes(dtype, outtype):
    text = merged_usage(with_(dtype=dtype))
    assert f"vllm serve MODEL --dtype {dtype}\n" in text
    assert f"--outtype {outtype} " in text


@pytest.mark.parametrize("rope_type", ["llama3", "theta", "default", "longrope"])
def test_what_was_not_compared_is_not_claimed(rope_type):
    text = merged_usage(with_(rope_type=rope_type))
    assert text.count("(not compared with transformers for these positions)") == 2
    assert "by itself" not in text
    assert "4.57" not in text


@pytest.mark.parametrize("template", ["vicuna", "tokenizer", None])
def test_chat_models_are_asked_with_their_template(template):
    assert ("apply_chat_template" in merged_usage(with_(template=template))) == (template is not None)


def test_an_adapter_names_its_base():
    text = adapter_usage(MODEL)
    assert 'from_pretrained("NousResearch/Llama-2-7b-hf", config=config' in text
    assert "--model_name_or_path NousResearch/Llama-2-7b-hf --adapter_name_or_path ADAPTER --save_path MODEL" in text
    assert "`BASE`" not in text
    assert "`BASE` for the base model named above" in adapter_usage(with_(base=None))
    assert "vllm serve" not in text
