"""Whatever a YAML, a data file or a command line holds: it works, or one message says what is wrong.

Never another exception, never a hang, and never an input that is changed or gone. See tests/fuzzing.py.
"""

import dataclasses
import gzip
import json
import os
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from accelerate.state import AcceleratorState, PartialState
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from component.data.document import SampleOptions, open_tokens
from component.data.record import CHAT_FIELDS, REFUSED_MESSAGE
from component.data.sample import generate_stream
from component.data.token_file import index_path, write_tokens
from component.inference.prompt_file import read_prompts
from component.train.argument import LongQLoRAArguments
from component.train.rehearsal import rehearse
from component.train.settings import parse_arguments
from tests.conftest import ROOT, TEXTS
from tests.fuzzing import damaged, damaged_bytes, damaged_json, damaged_words, examples, odd_values, survives

RUN = {
    "output_dir": "run",
    "model_name_or_path": "base",
    "train_file": "train.jsonl",
    "sft": False,
    "max_seq_length": 32,
    "model_max_length": 128,
    "max_steps": 1,
    "learning_rate": 1e-3,
    "target_modules": ["q_proj", "v_proj"],
    "report_to": "none",
}
YAML_KEYS = tuple(item.name for of in (LongQLoRAArguments, TrainingArguments) for item in dataclasses.fields(of))
CHATS = [
    {"input": "Where?", "output": "There."},
    {
        "instruction": "Translate.",
        "input": "ein Text",
        "output": "a text",
        "system": "Be brief.",
        "history": [["a", "b"]],
    },
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"},
        ]
    },
    {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "id": 7},
]
RECORD_KEYS = tuple(sorted(CHAT_FIELDS | REFUSED_MESSAGE.keys() | {"text"}))


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder with a folder `inputs`; where nothing else is named, programs write here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inputs").mkdir()
    return tmp_path


def parsed(words: list[str]) -> None:
    """The checks of train.py before it reads other files, leaving no trace in this process."""
    with mock.patch.dict(os.environ, {"RANK": "0"}):
        try:
            rehearse(parse_arguments(words)[1])
        finally:
            unset_hf_deepspeed_config()
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()


# ---- YAML and the command line of train.py


@st.composite
def yaml_files(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(["key", "key", "value", "bytes"]))
    if kind == "bytes":
        return draw(damaged_bytes(yaml.safe_dump(RUN).encode()))
    key = draw(st.sampled_from(YAML_KEYS))
    values = RUN | {key: draw(odd_values())} if kind == "key" else draw(damaged(RUN, YAML_KEYS))
    return yaml.safe_dump(values).encode()


@examples(250)
@given(content=yaml_files())
def test_fuzz_yaml(content, workplace):
    file = workplace / "inputs" / "run.yaml"
    file.write_bytes(content)
    survives(lambda: parsed(["--train_args_file", str(file)]), workplace / "inputs")


@examples(100)
@given(words=damaged_words(["--learning_rate", "1e-4", "--lora_rank", "8"], tuple(f"--{key}" for key in YAML_KEYS)))
def test_fuzz_overrides(words, workplace):
    file = workplace / "inputs" / "run.yaml"
    file.write_text(yaml.safe_dump(RUN))
    survives(lambda: parsed(["--train_args_file", str(file), *words]), workplace / "inputs")


# ---- training data


def streamed(file: Path, tokenizer, sft: bool, packing: bool) -> None:
    options = SampleOptions(32, sft, vocab_size=len(tokenizer))
    list(generate_stream([str(file)], tokenizer, dataclasses.asdict(options), packing))


@examples(250)
@given(
    data=st.data(), sft=st.booleans(), packing=st.booleans(), name=st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz"])
)
def test_fuzz_records(data, sft, packing, name, tokenizer, workplace):
    records = CHATS if sft else [{"text": text} for text in TEXTS[:3]]
    lines = [data.draw(damaged_json(record, RECORD_KEYS)) for record in records]
    content = b"[" + b",".join(lines) + b"]" if name == "a.json" else b"\n".join(lines)
    content = gzip.compress(content) if name.endswith(".gz") else content
    if not data.draw(st.integers(0, 4)):
        content = data.draw(damaged_bytes(content))
    file = workplace / "inputs" / name
    file.write_bytes(content)
    survives(lambda: streamed(file, tokenizer, sft, packing), workplace / "inputs")


@examples(40)
@given(data=st.data(), sft=st.booleans(), name=st.sampled_from(["a.parquet", "a.txt", "a.jsonl.zst", "a.jsonl.xz"]))
def test_fuzz_damaged_files(data, sft, name, tokenizer, workplace):
    file = workplace / "inputs" / name
    if name == "a.parquet":
        columns = data.draw(
            st.dictionaries(st.sampled_from(RECORD_KEYS), st.sampled_from([["a", None], [1, 2], [[], ["a"]]]))
        )
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        file.write_bytes(data.draw(damaged_bytes(file.read_bytes()) | st.just(file.read_bytes())))
    else:
        file.write_bytes(data.draw(damaged_bytes("\n".join(TEXTS).encode())))
    survives(lambda: streamed(file, tokenizer, sft, False), workplace / "inputs")


@examples(150)
@given(data=st.data(), policy=st.sampled_from(["split", "truncate", "drop"]))
def test_fuzz_token_files(data, policy, tokenizer, workplace):
    file = workplace / "inputs" / "tokens.bin"
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    write_tokens(file, ids, tokenizer, name="tiny", overwrite=True)
    index = index_path(file)
    damage = data.draw(st.sampled_from(["ids", "index", "no index"]))
    if damage == "index":
        index.write_bytes(data.draw(damaged_json(json.loads(index.read_text()), ("format", "sources"))))
    else:
        file.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
    if damage == "no index":
        index.unlink()
        np.array(data.draw(st.lists(st.integers(0, 2**32 - 1), max_size=40)), dtype=np.uint32).tofile(file)
    options = SampleOptions(32, False, truncation_policy=policy, vocab_size=len(tokenizer))

    def read() -> None:
        open_tokens(str(file), tokenizer, options)
        list(generate_stream([str(file)], tokenizer, dataclasses.asdict(options), False))

    survives(read, workplace / "inputs")


@examples(40)
@given(lines=st.lists(damaged_json({"prompt": "Once", "id": 1}, ("text", "input")), min_size=1, max_size=3))
def test_fuzz_prompts(lines, workplace):
    file = workplace / "inputs" / "prompts.jsonl"
    file.write_bytes(b"\n".join(lines))
    survives(lambda: read_prompts(str(file)), workplace / "inputs")


# ---- command lines of the programs

PROGRAMS = {
    "script/evaluate/evaluate.py": "--base_model {base} --data_path {tokens} --seq_len 16 --output_json result.json",
    "script/merge_lora.py": "--adapter_name_or_path {adapter} --save_path merged --check no --max_shard_size 1GB",
    "script/estimate_memory.py": "--model_name_or_path {base} --max_seq_length 2048 --host_gib 8 --lora_rank 4",
    "script/inference/inference.py": "--model_name_or_path {base} --prompt dog --max_new_tokens 2 --top_p 0.5",
    "script/data/tokenize_bin.py": "--source {texts} --tokenizer {base} --output out.bin",
    "script/data/build_pretrain.py": "--source {texts} --tokenizer {base} --output out.jsonl --min_tokens 2",
}


def own_flags(program: str) -> tuple[str, ...]:
    code = (ROOT / program).read_text(encoding="utf-8")
    return tuple(re.findall(r'add_argument\(\s*"(--\w+)"', code))


@pytest.fixture
def places(base_folder, adapter_folder, tokenizer, workplace) -> dict[str, Path]:
    """Copies of a base, an adapter, texts and tokens in `inputs`."""
    inputs = workplace / "inputs"
    found = {name: inputs / name for name in ("base", "adapter", "texts.jsonl", "tokens.bin")}
    shutil.copytree(base_folder, found["base"])
    shutil.copytree(adapter_folder, found["adapter"])
    found["texts.jsonl"].write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    write_tokens(found["tokens.bin"], ids, tokenizer, name="tiny")
    return {name.partition(".")[0]: path for name, path in found.items()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_fuzz_flags(program, run_program, places, workplace):
    words = PROGRAMS[program].format(**places).split()
    one_process = ["--num_proc", "1"] if "/data/" in program else []  # the more, the slower

    def run(words: list[str]) -> int:
        for made in workplace.iterdir():
            if made.name != "inputs":
                shutil.rmtree(made) if made.is_dir() else made.unlink()
        sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own is, unlike pytest's
        return run_program(program, *words, *one_process).status

    @examples(25)
    @given(words=damaged_words(words, own_flags(program)))
    def check(words):
        survives(lambda: run(words), workplace / "inputs")

    assert run(words) == 0
    check()
