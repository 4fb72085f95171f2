"""What happens when a YAML, a flag, a data file or a folder is wrong? One message and a non-zero exit status.

Each case breaks one thing in valid inputs (`test_the_valid_inputs_work`) and lists what the message must name: the
field (or file and line), the value, and a word of the cure. Programs run in this process, where a traceback is an
exception that fails the test; the last tests start real processes.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from component.checkpoint import write_record
from component.rope import extend_context
from tests.conftest import ROOT, Outcome, build_llama
from tests.outcome import refused

EVALUATE, MERGE = "script/evaluate/evaluate.py", "script/merge_lora.py"
INFERENCE, CHAT = "script/inference/inference.py", "script/inference/chat.py"
CONTEXT = 128  # tokens; twice the tiny base's
LINES = ['{"text": "A first text, long enough to learn from."}', '{"text": "And a second one."}']


class Workshop:
    """A folder with everything that a run needs, valid until a test breaks it."""

    def __init__(self, folder: Path, base: Path, adapter: Path):
        self.folder, self.base, self.pristine_adapter = folder, base, adapter
        self.train_file = self.write("train.jsonl", "\n".join(LINES) + "\n")
        self.output = folder / "run"

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def values(self, **changes) -> dict:
        values = {
            "output_dir": str(self.output),
            "model_name_or_path": str(self.base),
            "train_file": str(self.train_file),
            "sft": False,
            "max_seq_length": 32,
            "model_max_length": CONTEXT,
            "max_steps": 1,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-3,
            "lora_rank": 4,
            "load_in_4bit": False,
            "optim": "adamw_torch",
            "report_to": "none",
            "disable_tqdm": True,
        }
        return {key: value for key, value in (values | changes).items() if value is not ...}

    def yaml(self, **changes) -> list[str]:
        """The flags of a run with these keys changed, or left out where the value is `...`."""
        return ["--train_args_file", str(self.write("run.yaml", yaml.safe_dump(self.values(**changes))))]

    def tokens(self, *ids: int, dtype=np.uint16) -> Path:
        path = self.folder / "tokens.bin"
        np.array(ids, dtype=dtype).tofile(path)
        return path

    def copy_base(self) -> Path:
        return Path(shutil.copytree(self.base, self.folder / "own-base"))

    def adapter(self, name: str = "adapter") -> Path:
        return Path(shutil.copytree(self.pristine_adapter, self.folder / name))

    def foreign_adapter(self) -> Path:
        """As PEFT alone writes it: without a record of base, factor and file sizes."""
        folder = self.adapter()
        (folder / "longqlora.json").unlink()
        return folder


@pytest.fixture
def workshop(tmp_path, base_folder, adapter_folder) -> Workshop:
    return Workshop(tmp_path, base_folder, adapter_folder)


@pytest.fixture
def train(run_program, workshop):
    return lambda *words, **changes: run_program("train.py", *workshop.yaml(**changes), *words)


@pytest.fixture
def evaluate(run_program, workshop):
    """Evaluates the tiny base on a file of 100 tokens, unless the flags say otherwise."""

    def run(*words):
        flags = ["--base_model", workshop.base, "--seq_len", 16]
        if "--data_path" not in words:
            flags += ["--data_path", workshop.tokens(*range(2, 102))]
        return run_program(EVALUATE, *flags, *words)

    return run


def test_the_valid_inputs_work(train, evaluate, run_program, workshop):
    outcomes = [
        train(),
        evaluate(),
        evaluate("--peft_model", workshop.pristine_adapter),
        run_program(MERGE, "--adapter_name_or_path", workshop.pristine_adapter, "--save_path", workshop.folder / "m"),
        run_program(INFERENCE, "--model_name_or_path", workshop.base, "--max_new_tokens", 2, stdin=b"The dog"),
        run_program(CHAT, "--adapter_name_or_path", workshop.pristine_adapter, "--max_new_tokens", 2, stdin=b"a\n"),
    ]
    assert [outcome.status for outcome in outcomes] == [0] * 6, [outcome.err for outcome in outcomes]
    assert (workshop.output / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("program", ["train.py", EVALUATE, MERGE, INFERENCE, CHAT])
def test_help(program, run_program):
    outcome = run_program(program, "--help")
    assert outcome.status == 0
    assert "python" in outcome.out or "train.py" in outcome.out, "the command that runs it"


# --- the YAML file ---

YAML_VALUES = {
    "unknown key": ({"lora_rnak": 8}, "lora_rnak", "did you mean lora_rank"),
    "unknown TrainingArguments key": ({"learnin_rate": 1e-4}, "learnin_rate", "did you mean learning_rate"),
    "missing model": ({"model_name_or_path": ...}, "model_name_or_path: missing", "folder", "hub id"),
    "missing data": ({"train_file": ...}, "train_file: missing", ".jsonl"),
    "missing sft": ({"sft": ...}, "sft: missing", "true", "false"),
    "missing max_seq_length": ({"max_seq_length": ...}, "max_seq_length: missing", "tokens"),
    "missing output_dir": ({"output_dir": ...}, "output_dir: missing", "where"),
    "text for a whole number": ({"lora_rank": "many"}, "lora_rank", "'many'", "whole number"),
    "fraction for a whole number": ({"max_steps": 1.5}, "max_steps", "1.5", "whole number"),
    "text for a boolean": ({"sft": "perhaps"}, "sft", "'perhaps'", "true or false"),
    "boolean for a number": ({"learning_rate": True}, "learning_rate", "True", "number"),
    "list for a path": ({"model_name_or_path": ["a"]}, "model_name_or_path", "['a']", "text"),
    "exponent with a slip": ({"learning_rate": "2e-4x"}, "learning_rate", "'2e-4x'", "number"),
    "not a number": ({"learning_rate": float("nan")}, "learning_rate", "nan", "number"),
    "infinite": ({"lora_alpha": float("inf")}, "lora_alpha", "inf", "number"),
    "both precisions": ({"fp16": True, "bf16": True}, "fp16", "bf16", "true", "keep one"),
    "fp16 without a GPU": ({"fp16": True}, "fp16", "true", "no GPU", "leave it out"),
    "bf16 without a GPU": ({"bf16": True}, "bf16: true", "no GPU", "use_cpu: true"),
    "flash without a GPU": ({"use_flash_attn": True}, "use_flash_attn", "true", "GPU", "leave it out"),
    "memory budget without a GPU": ({"memory_budget_gib": 32}, "memory_budget_gib", "32", "no GPU", "leave"),
    "negative memory budget": ({"memory_budget_gib": -1}, "memory_budget_gib", "-1", "above 0"),
    "samples beyond the context": (
        {"max_seq_length": 256},
        "max_seq_length",
        "256",
        "model_max_length",
        "128",
        "raise model_max_length",
    ),
    "samples of one token": ({"max_seq_length": 1}, "max_seq_length", "1", "at least 2"),
    "context of no token": ({"model_max_length": 0}, "model_max_length", "0", "at least"),
    "odd group": ({"group_size": 7}, "group_size", "7", "even"),
    "ratio above 1": ({"group_size_ratio": 1.5}, "group_size_ratio", "1.5", "(0, 1]"),
    "ratio of 0": ({"group_size_ratio": 0}, "group_size_ratio", "0", "(0, 1]"),
    "unknown rope type": ({"rope_type": "ntk"}, "rope_type", "'ntk'", "linear, dynamic, yarn"),
    "unknown optimizer": ({"optim": "paged_adamw_32bits"}, "optim", "paged_adamw_32bits", "mean paged_adamw_32bit"),
    "unknown scheduler": ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type", "'cosin'", "did you mean cosine"),
    "learning rate below 0": ({"learning_rate": -1e-4}, "learning_rate", "-0.0001", "(0, 1)"),
    "LoRA of rank 0": ({"lora_rank": 0}, "lora_rank", "0", "at least 1"),
    "dropout of everything": ({"lora_dropout": 1.0}, "lora_dropout", "1.0", "[0, 1)"),
    "no step at all": ({"max_steps": 0}, "max_steps", "0", "at least 1"),
    "negative seed": ({"seed": -1}, "seed", "-1", "0 or more"),
    "negative workers": ({"dataloader_num_workers": -1}, "dataloader_num_workers", "-1", "0 or more"),
    "unknown tracker": ({"report_to": "tensorbord"}, "report_to", "tensorbord", "tensorboard"),
    "evaluation without data": ({"eval_strategy": "steps"}, "eval_strategy", "steps", "eval_file"),
    "best model without evaluation": ({"load_best_model_at_end": True}, "load_best_model_at_end", "strategy"),
    "target that matches nothing": (
        {"target_modules": "q_proj,k_prj"},
        "target_modules",
        "'k_prj'",
        "did you mean k_proj",
    ),
    "no target": ({"target_modules": " , "}, "target_modules", "leave the key out"),
    "missing DeepSpeed file": ({"deepspeed": "no/such.json"}, "deepspeed", "no/such.json", "train_args/deepspeed/"),
    "missing base": ({"model_name_or_path": "/no/such/model"}, "model_name_or_path", "/no/such/model", "folder"),
    "unreachable base": ({"model_name_or_path": "some/model"}, "model_name_or_path", "some/model", "hub"),
    "missing data file": ({"train_file": "/no/such.jsonl"}, "train_file", "/no/such.jsonl", "name one"),
    "unreachable data": ({"train_file": "some/data/file.jsonl"}, "train_file", "some/data/file.jsonl", "hub"),
    "missing evaluation data": ({"eval_file": "/no/such.jsonl"}, "eval_file", "/no/such.jsonl", "name one"),
    "resume from nothing": (
        {"resume_from_checkpoint": "/no/checkpoint-3"},
        "resume_from_checkpoint",
        "/no/checkpoint-3",
        "auto",
    ),
    "resume what never began": ({"resume_from_checkpoint": True}, "resume_from_checkpoint", "true", "auto"),
}


@pytest.mark.parametrize("case", YAML_VALUES)
def test_a_value_in_the_yaml(case, train):
    changes, *parts = YAML_VALUES[case]
    refused(train(**changes), *parts)


YAML_FILES = {
    "not YAML": ("output_dir: [a\nsft: false\n", "run.yaml", "not YAML", "line 2"),
    "empty": ("", "run.yaml", "key: value"),
    "a list": ("- output_dir\n- sft\n", "run.yaml", "key: value"),
    "a key twice": ("sft: false\nlora_rank: 8\nlora_rank: 64\n", "run.yaml", "lora_rank", "twice", "line 3"),
    "a list for a key": ("? [a, b]\n: 1\n", "run.yaml", "line 1"),
    "not UTF-8": ("output_dir: caf\xe9\n".encode("latin-1"), "run.yaml", "utf-8"),
    "a number for a key": ("1: 2\n", "run.yaml", "1: unknown key"),
}


@pytest.mark.parametrize("case", YAML_FILES)
def test_the_yaml_file(case, run_program, workshop):
    content, *parts = YAML_FILES[case]
    refused(run_program("train.py", "--train_args_file", workshop.write("run.yaml", content)), *parts)


def test_no_yaml_file(run_program):
    refused(
        run_program("train.py", "--train_args_file", "no/such.yaml"),
        "--train_args_file",
        "no/such.yaml",
        "train_args/",
    )


def test_several_problems_come_in_one_message_before_any_weight_is_loaded(train, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    outcome = train(lora_rnak=8, sft="perhaps", train_file=..., group_size=7, deepspeed="no.json", optim="adamv")
    refused(outcome, "lora_rnak", "sft: 'perhaps'", "train_file: missing", "group_size: 7", "no.json", "adamv")
    assert outcome.err.count("error: ") == 1


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"target_modules": "q_proj,k_prj"}, ("target_modules", "k_prj")),
        ({"eval_strategy": "steps"}, ("eval_strategy", "eval_file")),
        ({"report_to": "tensorbord"}, ("report_to", "tensorbord")),
        ({"train_file": "/no/such.jsonl"}, ("train_file", "/no/such.jsonl")),
    ],
    ids=["target", "evaluation", "tracker", "data"],
)
def test_a_yaml_is_refused_before_any_weight_is_loaded(changes, parts, train, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("component.model.AutoModelForCausalLM.from_pretrained", load)
    refused(train(**changes), *parts)


DEEPSPEED_FILES = {
    "not JSON": ("{'zero_optimization': {}}", "deepspeed", "ds.json", "JSON"),
    "a list": ("[]", "deepspeed", "ds.json", "object"),
    "another batch size": (
        '{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 3}',
        "train_micro_batch_size_per_gpu",
        "3",
        "auto",
    ),
}


@pytest.mark.parametrize("case", DEEPSPEED_FILES)
def test_the_deepspeed_file(case, train, workshop):
    content, *parts = DEEPSPEED_FILES[case]
    refused(train(deepspeed=str(workshop.write("ds.json", content))), *parts)


@pytest.mark.parametrize("wrong", ["bf16", "use_flash_attn"])
def test_a_v100_is_told_what_it_can_run(wrong, train, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (7, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *device: "Tesla V100-SXM2-32GB")
    cure = {"bf16": "fp16: true", "use_flash_attn": "leave it out"}[wrong]
    precision = {"bf16": {}, "use_flash_attn": {"fp16": True}}[wrong]
    refused(train(**precision, **{wrong: True}), f"{wrong}: true", "Tesla V100-SXM2-32GB", cure)


def test_an_output_dir_that_is_a_file(train, workshop):
    workshop.output.write_text("notes")
    refused(train(), "output_dir", str(workshop.output), "file", "name a folder")
    assert workshop.output.read_text() == "notes"


def test_an_output_dir_that_holds_a_finished_run(train, workshop):
    shutil.copytree(workshop.pristine_adapter, workshop.output)
    before = {file.name: file.read_bytes() for file in workshop.output.iterdir()}
    refused(train(), "output_dir", str(workshop.output), "finished", "overwrite_output_dir")
    assert {file.name: file.read_bytes() for file in workshop.output.iterdir()} == before


# --- the command line of train.py ---

COMMAND_LINES = {
    "key without value at the end": (["--learning_rate"], "--learning_rate", "no value", "--key value"),
    "key without value before another": (["--learning_rate", "--max_steps", "2"], "--learning_rate", "no value"),
    "stray word": (["fast"], "'fast'", "--key value"),
    "unknown key": (["--lora_rang", "8"], "lora_rang", "did you mean lora_rank"),
    "value of a wrong type": (["--lora_rank", "eight"], "lora_rank", "'eight'", "whole number"),
    "value that is no YAML": (["--report_to", "[none"], "--report_to", "[none"),
    "single dash": (["-lora_rank", "8"], "-lora_rank", "--key value"),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_the_command_line(case, train):
    words, *parts = COMMAND_LINES[case]
    refused(train(*words), *parts)


# --- training data ---

TEXT = '{"text": "A text to learn from."}\n'
DATA_FILES = {
    "not JSON": (TEXT + "{'text': 'single quotes'}\n", "data.jsonl:2", "not JSON", "JSON object"),
    "blank lines count": (TEXT + "\n\n" + '{"text": \n', "data.jsonl:4", "not JSON", "JSON object"),
    "wrong key": ('{"content": "x"}\n' + TEXT, "data.jsonl:1", '"text"', "content", "sft: false"),
    "SFT lines for pretraining": ('{"input": "a", "output": "b"}\n', "data.jsonl:1", "input, output", "sft: true"),
    "not an object": (TEXT + '["a text"]\n', "data.jsonl:2", '["a text"]', "JSON object"),
    "a bare string": ('"a text"\n', "data.jsonl:1", '"a text"', "JSON object"),
    "a number for a text": (TEXT * 2 + '{"text": 5}\n', "data.jsonl:3", '"text" is 5', "not a text"),
    "null for a text": ('{"text": null}\n', "data.jsonl:1", '"text" is null', "not a text"),
    "half a surrogate pair": (TEXT + '{"text": "broken \\ud83d emoji"}\n', "data.jsonl:2", "\\ud83d"),
    "not UTF-8": ((TEXT * 3).encode() + b'{"text": "caf\xe9"}\n', "data.jsonl:4", "not UTF-8", "convert"),
    "UTF-16": (TEXT.encode("utf-16"), "data.jsonl:1", "not UTF-8", "convert"),
    "zeros": (bytes(3000), "data.jsonl:1", "not JSON", "JSON object"),
    "a zero byte": (TEXT + '{"text": "a\\u0000b"}\n', "data.jsonl:2", "not text", "zero byte at 1", "UTF-8"),
    "a header of zeros": (bytes(1024) + TEXT.encode(), "data.jsonl:1", "not JSON"),
    "empty": ("", "train_file", "nothing to read", "data.jsonl", "no record"),
    "only empty texts": (
        '{"text": ""}\n{"text": " \\n"}\n',
        "train_file",
        "no label tokens",
        "data.jsonl",
        "lines: 2",
        "texts",
    ),
}


@pytest.mark.parametrize("case", DATA_FILES)
def test_a_file_of_texts(case, train, workshop):
    content, *parts = DATA_FILES[case]
    refused(train(train_file=str(workshop.write("data.jsonl", content))), *parts)


ANSWER_FILES = {
    "texts for SFT": (TEXT, "data.jsonl:1", '"input"', "sft: false"),
    "no output": ('{"input": "a question"}\n', "data.jsonl:1", '"output"', "input"),
    "a list of turns": (
        '{"input": ["a", "b"], "output": "c"}\n',
        "data.jsonl:1",
        '"input" is ["a", "b"]',
        "not a text",
    ),
    "no label left after cutting": (
        json.dumps({"input": "why " * 200, "output": "because"}) + "\n",
        "train_file",
        "no label tokens",
        "data.jsonl",
        "max_seq_length",
    ),
    "only empty answers": (
        '{"input": "a question", "output": " "}\n',
        "train_file",
        "no label tokens",
        "data.jsonl",
        "answer",
    ),
}


@pytest.mark.parametrize("case", ANSWER_FILES)
def test_a_file_of_answers(case, train, workshop):
    content, *parts = ANSWER_FILES[case]
    refused(train(train_file=str(workshop.write("data.jsonl", content)), sft=True), *parts)


@pytest.mark.parametrize("content", [bytes(3000), bytes(1024) + b"A text.", "A text.".encode("utf-16-le")])
def test_a_text_file_with_zero_bytes(content, train, workshop):
    data = workshop.write("data.txt", content)
    refused(train(train_file=str(data)), "data.txt:1", "is not text: it has a zero byte at", "convert it to UTF-8")


def test_many_bad_lines_are_counted_and_the_first_ones_named(train, workshop):
    data = workshop.write("data.jsonl", TEXT + "{\n" * 99)
    outcome = train(train_file=str(data))
    refused(outcome, "99 of 100 lines", "data.jsonl:2", "data.jsonl:3")
    assert len(outcome.err) < 2500


def test_a_folder_without_data(train, workshop):
    (workshop.folder / "texts").mkdir()
    refused(train(train_file=str(workshop.folder / "texts")), "train_file", "texts", ".jsonl", "name one")


def test_bad_evaluation_data_is_named_by_its_own_key(train, workshop):
    data = workshop.write("held-out.jsonl", '{"text": ""}\n')
    refused(train(eval_file=str(data)), "eval_file", "no label tokens", "held-out.jsonl", "texts")


# --- evaluate.py ---

BIN_FILES = {
    "odd size": (b"\x05\x00\x06", "data_path", "tokens.bin", "3 bytes", "uint16"),
    "empty": (b"", "data_path", "tokens.bin", "0 bytes", "uint16"),
    "zeros": (bytes(200), "data_path", "tokens.bin has only zeros", "token 0", "download or create it again"),
    "beyond the vocabulary": (
        np.array([3] * 50 + [60000] + [3] * 49, dtype=np.uint16).tobytes(),
        "data_path",
        "token 50",
        "60000",
        "another tokenizer",
    ),
    "no window": (np.array([3] * 32, dtype=np.uint16).tobytes(), "data_path", "32 tokens", "16", "shorten"),
}


@pytest.mark.parametrize("case", BIN_FILES)
def test_a_file_of_tokens(case, evaluate, workshop):
    content, *parts = BIN_FILES[case]
    refused(evaluate("--data_path", workshop.write("tokens.bin", content)), *parts)


EVALUATE_FLAGS = {
    "missing data": (["--data_path", "/no/such.bin"], "data_path", "/no/such.bin", "name a .bin file"),
    "a folder of data": (["--data_path", "/tmp"], "data_path", "/tmp", "file"),
    "no protocol of ours": (["--protocol", "rolling"], "--protocol", "'rolling'", "sliding"),
    "window of one token": (["--seq_len", "1"], "seq_len", "1", "at least 2"),
    "window that is no number": (["--seq_len", "8k"], "--seq_len", "'8k'", "int"),
    "stride of 0": (["--sliding_window", "0"], "sliding_window", "0", "at least 1"),
    "stride below 0": (["--sliding_window", "-4"], "sliding_window", "-4", "at least 1"),
    "batch of nothing": (["--batch_size", "0"], "batch_size", "0", "at least 1"),
    "neither true nor false": (["--low_rank_training", "yes"], "--low_rank_training", "'yes'", "true"),
    "unknown flag": (["--seq_length", "16"], "--seq_length", "16"),
    "missing model": (["--base_model", "/no/such/model"], "base_model", "/no/such/model", "folder"),
    "missing adapter": (["--peft_model", "/no/such/adapter"], "peft_model", "/no/such/adapter", "folder"),
    "result into no folder": (
        ["--output_json", "/dev/null/r.json"],
        "output_json",
        "/dev/null/r.json",
        "can't be written",
    ),
}


@pytest.mark.parametrize("case", EVALUATE_FLAGS)
def test_a_flag_of_evaluate(case, evaluate):
    words, *parts = EVALUATE_FLAGS[case]
    refused(evaluate(*words), *parts)


def test_evaluating_no_model(run_program, workshop):
    refused(run_program(EVALUATE, "--data_path", workshop.tokens(1, 2, 3)), "--base_model", "missing", "--peft_model")


def test_a_context_that_the_adapter_was_not_trained_for(evaluate, workshop):
    outcome = evaluate("--peft_model", workshop.pristine_adapter, "--context_size", 512)
    refused(outcome, "context_size", "512", "128", "leave context_size out")


def test_a_context_that_the_merged_model_was_not_made_for(evaluate, workshop):
    extended = workshop.copy_base()
    config = AutoConfig.from_pretrained(extended)
    extend_context(config, CONTEXT)
    config.save_pretrained(extended)
    outcome = evaluate("--base_model", extended, "--context_size", 512)
    refused(outcome, "context_size", "512", str(extended), "128", "leave context_size out")


# --- inference.py and chat.py ---

GENERATION_FLAGS = {
    "temperature of 0": (["--temperature", "0"], "--temperature", "0", "--do_sample false"),
    "temperature that is no number": (["--temperature", "nan"], "--temperature", "nan", "from 0.01 to 100"),
    "top_p above 1": (["--top_p", "2"], "--top_p", "2", "from 0.01 to 1"),
    "nothing to generate": (["--max_new_tokens", "0"], "--max_new_tokens", "0", "from 1"),
    "penalty of 0": (["--repetition_penalty", "0"], "--repetition_penalty", "0", "from 0.1 to 10"),
    "context of 0": (["--context_size", "0"], "--context_size", "0", "at least 1"),
    "negative seed": (["--seed", "-1"], "--seed", "-1", "0 or more"),
    "neither true nor false": (["--do_sample", "maybe"], "--do_sample", "'maybe'", "true"),
}


@pytest.mark.parametrize("program", [INFERENCE, CHAT], ids=["inference", "chat"])
@pytest.mark.parametrize("case", GENERATION_FLAGS)
def test_a_flag_of_generation(case, program, run_program, workshop):
    words, *parts = GENERATION_FLAGS[case]
    refused(run_program(program, "--model_name_or_path", workshop.base, *words, stdin=b"The dog"), *parts)


@pytest.mark.parametrize("program", [INFERENCE, CHAT], ids=["inference", "chat"])
class TestGeneration:
    def test_prompt_longer_than_the_context(self, program, run_program, workshop):
        outcome = run_program(program, "--model_name_or_path", workshop.base, stdin=b"the dog " * 200)
        refused(outcome, "prompt", "64", "shorten")
        assert re.search(r"\d{3,} tokens", outcome.err)

    def test_prompt_that_is_not_utf_8(self, program, run_program, workshop):
        outcome = run_program(program, "--model_name_or_path", workshop.base, stdin=b"caf\xe9\n")
        refused(outcome, "standard input", "UTF-8", "convert")

    def test_context_beyond_the_adapters_record(self, program, run_program, workshop):
        outcome = run_program(
            program, "--adapter_name_or_path", workshop.pristine_adapter, "--context_size", 512, stdin=b"The dog"
        )
        refused(outcome, "context_size", "512", "128", "leave context_size out")

    def test_no_finished_run(self, program, run_program, workshop, monkeypatch):
        monkeypatch.setattr("component.checkpoint.newest_run.__defaults__", (workshop.folder,))
        outcome = run_program(program, stdin=b"The dog")
        refused(outcome, "no finished run", str(workshop.folder), "--adapter_name_or_path")


def test_no_prompt_file(run_program, workshop):
    outcome = run_program(INFERENCE, "--model_name_or_path", workshop.base, "--prompt_file", "no/such.txt")
    refused(outcome, "--prompt_file", "no/such.txt", "name a text file")


def test_a_prompt_file_that_is_not_utf_8(run_program, workshop):
    prompt = workshop.write("prompt.txt", b"caf\xe9")
    outcome = run_program(INFERENCE, "--model_name_or_path", workshop.base, "--prompt_file", prompt)
    refused(outcome, "--prompt_file", str(prompt), "UTF-8", "convert")


# --- merge_lora.py ---


@pytest.fixture
def merge(run_program):
    return lambda *words: run_program(MERGE, *words)


def test_merging_without_a_finished_run(merge, workshop, monkeypatch):
    monkeypatch.setattr("component.checkpoint.newest_run.__defaults__", (workshop.folder,))
    refused(merge(), "no finished run", str(workshop.folder), "train first")


def test_merging_into_what_exists(merge, workshop):
    target = workshop.folder / "model"
    target.mkdir()
    (target / "notes.txt").write_text("keep")
    outcome = merge("--adapter_name_or_path", workshop.pristine_adapter, "--save_path", target)
    refused(outcome, "--save_path", str(target), "exists", "name another")
    assert [file.name for file in target.iterdir()] == ["notes.txt"]


def test_merging_into_a_file(merge, workshop):
    target = workshop.write("notes", "keep") / "model"
    outcome = merge("--adapter_name_or_path", workshop.pristine_adapter, "--save_path", target)
    refused(outcome, "--save_path", str(target), "name another")


def test_merging_no_adapter(merge, workshop):
    outcome = merge("--adapter_name_or_path", "/no/such/adapter", "--save_path", workshop.folder / "model")
    refused(outcome, "adapter_name_or_path", "/no/such/adapter", "folder")


def test_merging_into_no_known_number_format(merge, workshop):
    outcome = merge("--adapter_name_or_path", workshop.pristine_adapter, "--dtype", "fp8")
    refused(outcome, "--dtype", "'fp8'", "float16")


def test_merging_an_adapter_beyond_its_record(merge, workshop):
    target = workshop.folder / "model"
    outcome = merge(
        "--adapter_name_or_path", workshop.pristine_adapter, "--save_path", target, "--context_size", "512"
    )
    refused(outcome, "context_size", "512", "128", "leave context_size out")
    assert not target.exists()


# --- adapter folders ---


def without_config(adapter: Path, workshop: Workshop):
    (adapter / "adapter_config.json").unlink()
    return "adapter_config.json", str(adapter)


def without_weights(adapter: Path, workshop: Workshop):
    (adapter / "adapter_model.safetensors").unlink()
    return "adapter_model.safetensors", str(adapter)


def with_half_the_weights(adapter: Path, workshop: Workshop):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return "adapter_model.safetensors", str(adapter)


def with_a_config_that_is_no_json(adapter: Path, workshop: Workshop):
    (adapter / "adapter_config.json").write_text("{'r': 4}")
    return "adapter_config.json", str(adapter)


def edit_weights(adapter: Path, change) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def without_a_tensor(adapter: Path, workshop: Workshop):
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    edit_weights(adapter, lambda weights: weights.pop(name))
    return str(adapter), "1 weights are missing", "layers.1.mlp.up_proj.lora_A"


def with_a_foreign_tensor(adapter: Path, workshop: Workshop):
    name = "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"
    edit_weights(adapter, lambda weights: weights.update({name: torch.zeros(4, 32)}))
    return str(adapter), "1 weights are unexpected", "layers.7.mlp.up_proj.lora_A"


def of_another_shape(adapter: Path, workshop: Workshop):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    edit_weights(adapter, lambda weights: weights.update({name: torch.zeros(4, 48)}))
    return str(adapter), "does not fit this base model", "layers.0.mlp.up_proj"


def for_another_architecture(adapter: Path, workshop: Workshop):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    return str(adapter), "c_attn"


class Payload:
    """Unpickling it runs code, as a malicious adapter would."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def with_code_in_it(adapter: Path, workshop: Workshop):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"weights": Payload(workshop.folder / "code-has-run")}, adapter / "adapter_model.bin")
    return "adapter_model.bin", str(adapter)


def with_bare_pickle_in_it(adapter: Path, workshop: Workshop):
    (adapter / "trainable_params.bin").write_bytes(pickle.dumps(Payload(workshop.folder / "code-has-run")))
    return "trainable_params.bin", str(adapter)


def with_an_added_pad_token(adapter: Path, workshop: Workshop):
    """Like LongLoRA's adapters, whose training added a row for [PAD]: 32001 instead of 32000."""
    vocab = AutoConfig.from_pretrained(workshop.base).vocab_size
    extras = {"base_model.model.model.embed_tokens.weight": torch.zeros(vocab + 1, 32)}
    torch.save(extras, adapter / "trainable_params.bin")
    return "trainable_params.bin", "embed_tokens", str(vocab + 1), str(vocab), "pad token", "resized"


def with_foreign_extras(adapter: Path, workshop: Workshop):
    extras = {"base_model.model.model.layers.9.input_layernorm.weight": torch.ones(32)}
    torch.save(extras, adapter / "trainable_params.bin")
    return "trainable_params.bin", "layers.9.input_layernorm"


FOREIGN_ADAPTERS = [
    without_config,
    without_weights,
    with_half_the_weights,
    with_a_config_that_is_no_json,
    without_a_tensor,
    with_a_foreign_tensor,
    of_another_shape,
    for_another_architecture,
    with_code_in_it,
    with_bare_pickle_in_it,
    with_an_added_pad_token,
    with_foreign_extras,
]


@pytest.mark.parametrize("spoil", FOREIGN_ADAPTERS, ids=lambda spoil: spoil.__name__)
def test_an_adapter_of_others(spoil, evaluate, workshop):
    adapter = workshop.foreign_adapter()
    parts = spoil(adapter, workshop)
    refused(evaluate("--peft_model", adapter, "--context_size", CONTEXT), *parts)
    assert not (workshop.folder / "code-has-run").exists()


def cut_record(adapter: Path):
    record = adapter / "longqlora.json"
    record.write_text(record.read_text()[:40])


def listed_record(adapter: Path):
    (adapter / "longqlora.json").write_text("[]")


def record_without_base(adapter: Path):
    record = json.loads((adapter / "longqlora.json").read_text())
    del record["base_model"]
    (adapter / "longqlora.json").write_text(json.dumps(record))


@pytest.mark.parametrize("spoil", [cut_record, listed_record, record_without_base], ids=lambda spoil: spoil.__name__)
def test_a_damaged_record(spoil, merge, workshop):
    adapter = workshop.adapter()
    spoil(adapter)
    refused(merge("--adapter_name_or_path", adapter), str(adapter / "longqlora.json"), "damaged", "use another")


@pytest.mark.parametrize("spoil", [without_config, without_weights, with_half_the_weights])
def test_an_adapter_of_ours_that_is_not_whole(spoil, merge, workshop):
    adapter = workshop.adapter()
    parts = spoil(adapter, workshop)
    refused(merge("--adapter_name_or_path", adapter), *parts, "incomplete", "use another")
    assert not workshop.adapter("x").with_name("adapter-merged").exists()


def test_an_adapter_whose_base_has_gone(merge, workshop):
    adapter = workshop.adapter()
    record = json.loads((adapter / "longqlora.json").read_text())
    write_record(adapter, record | {"base_model": "/moved/away"})
    refused(merge("--adapter_name_or_path", adapter), "model_name_or_path", "/moved/away")


def test_an_adapter_on_a_base_of_another_shape(evaluate, workshop, llama_config):
    other = workshop.folder / "other"
    config = AutoConfig.from_pretrained(workshop.base)
    config.hidden_size, config.head_dim, config.intermediate_size = 48, 12, 96
    build_llama(config).save_pretrained(other)
    AutoTokenizer.from_pretrained(workshop.base).save_pretrained(other)
    outcome = evaluate("--base_model", other, "--peft_model", workshop.pristine_adapter)
    refused(outcome, str(other), "48", "32", "base")


# --- checkpoints ---


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture
def killed(train, workshop) -> Path:
    """An output_dir with two checkpoints, the second one cut in half as by a kill while it was written."""
    assert train(max_steps=2, save_steps=1).status == 0
    for name in ("longqlora.json", "adapter_config.json", "adapter_model.safetensors"):
        (workshop.output / name).unlink()
    halve(workshop.output / "checkpoint-2" / "optimizer.pt")
    return workshop.output


def test_a_checkpoint_that_was_cut_in_half(killed, train):
    halved = killed / "checkpoint-2"
    outcome = train(max_steps=3, save_steps=1, resume_from_checkpoint=str(halved))
    refused(outcome, str(halved), "optimizer.pt", "use another checkpoint")
    # auto resumes from the last complete one
    assert train(max_steps=3, save_steps=1, resume_from_checkpoint="auto").status == 0
    history = json.loads((killed / "trainer_state.json").read_text())
    assert history["global_step"] == 3


def test_a_started_run_without_resume(killed, train):
    refused(train(), "output_dir", str(killed), "started", "resume_from_checkpoint: auto")


def test_a_checkpoint_without_its_record(killed, train):
    (killed / "checkpoint-1" / "longqlora.json").unlink()
    outcome = train(resume_from_checkpoint=str(killed / "checkpoint-1"))
    refused(outcome, "resume_from_checkpoint", "checkpoint-1", "auto")


# --- base models ---


def base_without_weights(base: Path):
    (base / "model.safetensors").unlink()
    return "weights", "safetensors"


def base_with_damaged_weights(base: Path):
    halve(base / "model.safetensors")
    return ("weights",)


def base_that_lacks_a_weight(base: Path):
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return "1 weights", "model.layers.0.mlp.up_proj.weight"


def base_of_another_shape(base: Path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    return ("weights",)


def base_without_config(base: Path):
    (base / "config.json").unlink()
    return ("config.json",)


def base_with_a_config_that_is_no_json(base: Path):
    (base / "config.json").write_text("{")
    return ("config.json",)


def base_of_no_known_type(base: Path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "camel"}))
    return ("camel",)


def base_without_tokenizer(base: Path):
    for file in base.glob("tokenizer*"):
        file.unlink()
    return ("tokenizer",)


def base_with_a_damaged_tokenizer(base: Path):
    halve(base / "tokenizer.json")
    return ("tokenizer",)


def base_without_end_of_sequence(base: Path):
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    return ("end-of-sequence",)


def base_of_gpt2(base: Path):
    (base / "model.safetensors").unlink()
    GPT2LMHeadModel(GPT2Config(vocab_size=384, n_positions=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(base)
    return "'gpt2'", "llama"


BASES = [
    base_without_weights,
    base_with_damaged_weights,
    base_that_lacks_a_weight,
    base_of_another_shape,
    base_without_config,
    base_with_a_config_that_is_no_json,
    base_of_no_known_type,
    base_without_tokenizer,
    base_with_a_damaged_tokenizer,
    base_without_end_of_sequence,
    base_of_gpt2,
]


@pytest.mark.parametrize("spoil", BASES, ids=lambda spoil: spoil.__name__)
def test_a_base(spoil, train, workshop):
    base = workshop.copy_base()
    parts = spoil(base)
    refused(train(model_name_or_path=str(base)), "model_name_or_path", str(base), *parts)
    assert not (workshop.output / "longqlora.json").exists()


CURE = re.compile(r"; [^;]*\b(use|name|fetch|download|train|extend|give|leave|save) ")


@pytest.mark.parametrize("spoil", [*FOREIGN_ADAPTERS, *BASES], ids=lambda spoil: spoil.__name__)
def test_what_does_not_load_comes_with_a_cure(spoil, train, evaluate, workshop):
    if spoil in BASES:
        base = workshop.copy_base()
        spoil(base)
        outcome = train(model_name_or_path=str(base))
    else:
        adapter = workshop.foreign_adapter()
        spoil(adapter, workshop)
        outcome = evaluate("--peft_model", adapter, "--context_size", CONTEXT)
    refused(outcome)
    message = outcome.err[outcome.err.rindex("error: ") :]
    assert CURE.search(message)
    assert "weights_only" not in message, "torch's advice to allow unpickling is not passed on"


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_a_bases_own_code_never_runs(part, run_program, train, workshop, monkeypatch):
    """Even with `y` on standard input: transformers would ask whether to trust it."""
    base = workshop.copy_base()
    witness = workshop.folder / "code-has-run"
    (base / "own.py").write_text(f"import os\nos.mkdir({str(witness)!r})\nclass Own: pass\n")
    file = base / ("config.json" if part == "config" else "tokenizer_config.json")
    values = json.loads(file.read_text())
    own = {"AutoConfig": "own.Own"} if part == "config" else {"AutoTokenizer": ["own.Own", None]}
    values |= {"auto_map": own, "model_type": "camel"} if part == "config" else {"auto_map": own}
    if part == "tokenizer":
        values["tokenizer_class"] = "Own"
    file.write_text(json.dumps(values))
    outcome = run_program("train.py", *workshop.yaml(model_name_or_path=str(base)), stdin=b"y\n" * 9)
    assert not witness.exists()
    assert "[y/N]" not in outcome.out
    if part == "config":
        refused(outcome, "model_name_or_path", str(base))


def test_a_bases_pickled_weights_run_no_code(train, workshop):
    base = workshop.copy_base()
    (base / "model.safetensors").unlink()
    torch.save({"weights": Payload(workshop.folder / "code-has-run")}, base / "pytorch_model.bin")
    refused(train(model_name_or_path=str(base)), "model_name_or_path", str(base), "weights")
    assert not (workshop.folder / "code-has-run").exists()


# --- as real processes ---


def start(*words: object, stdin: bytes = b"") -> Outcome:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


class TestProcesses:
    def test_train_with_a_bad_yaml(self, workshop):
        outcome = start("train.py", *workshop.yaml(lora_rnak=8, fp16=True))
        refused(outcome, "lora_rnak", "did you mean lora_rank", "fp16: true", "no GPU")

    @pytest.mark.slow
    def test_train_with_bad_data(self, workshop):
        data = workshop.write("data.jsonl", TEXT + "{\n")
        refused(start("train.py", *workshop.yaml(train_file=str(data))), "data.jsonl:2", "not JSON", "JSON object")

    @pytest.mark.slow
    def test_evaluate_with_a_bad_file(self, workshop):
        outcome = start(EVALUATE, "--base_model", workshop.base, "--data_path", workshop.write("t.bin", b"\x01"))
        refused(outcome, "data_path", "t.bin", "1 bytes")

    @pytest.mark.slow
    def test_inference_with_a_prompt_that_is_not_utf_8(self, workshop):
        outcome = start(INFERENCE, "--model_name_or_path", workshop.base, stdin=b"caf\xe9")
        refused(outcome, "standard input", "UTF-8")

    def test_merge_into_what_exists(self, workshop):
        words = ["--adapter_name_or_path", workshop.pristine_adapter, "--save_path", workshop.folder]
        refused(start(MERGE, *words), "--save_path", str(workshop.folder), "exists")
