"""inference.py at a terminal, in a pipe, and from a file of prompts to a file of answers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from component.loading import load_for_inference
from tests.conftest import ROOT
from tests.generation_flags import GREEDY
from tests.outcome import refused
from tests.reference.greedy import stock
from tests.terminal import CTRL_C, CTRL_D, Terminal
from tests.words import read_lines, write_lines

INFERENCE, CHAT = "script/inference/inference.py", "script/inference/chat.py"
SHORT = ("--do_sample", "false", "--max_new_tokens", "4")


@pytest.fixture
def infer(run_program, base_folder):
    def run(*words: object, stdin: bytes = b""):
        return run_program(INFERENCE, "--model_name_or_path", base_folder, *words, stdin=stdin)

    return run


class TestTerminal:
    def test_a_session(self, base_folder, tmp_path):
        words = ("--model_name_or_path", base_folder, "--context_size", 512, "--do_sample", "false")
        with Terminal(INFERENCE, *words, state=tmp_path, seconds_per_token=0.05) as terminal:
            terminal.wait_for("Input: ")
            terminal.type("The dog\n")
            terminal.wait_for("tokens of context used")
            terminal.wait_for("\n")
            while len(terminal.shown) < 5:
                terminal._read()
            terminal.type(CTRL_C)
            assert "(stopped)" in terminal.wait_for("Input: ")
            terminal.type(CTRL_D)
            assert terminal.status() == 0

    def test_ctrl_c_ends_a_run_with_one_prompt(self, base_folder, tmp_path):
        words = ("--model_name_or_path", base_folder, "--prompt", "The dog", "--context_size", 512)
        with Terminal(INFERENCE, *words, state=tmp_path, seconds_per_token=0.05) as terminal:
            terminal.wait_for("tokens of context used")
            terminal.type(CTRL_C)
            assert terminal.status() == 130
            assert "Traceback" not in terminal.shown


def test_a_prompt_on_the_command_line(infer, base_folder, tokenizer):
    outcome = infer("--prompt", "The dog", *SHORT)
    ids = stock(AutoModelForCausalLM.from_pretrained(base_folder), tokenizer("The dog").input_ids, max_new_tokens=4)
    assert outcome.out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    used = len(tokenizer("The dog").input_ids)
    assert f"{used} of 64 tokens of context used" in outcome.err
    assert f"{used + len(ids)} of 64 tokens of context used" in outcome.err, "as generated"
    assert "dynamic cache 0.0 MiB" in outcome.err


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_a_blank_prompt_is_refused_before_loading(prompt, infer):
    outcome = infer("--prompt", prompt)
    refused(outcome, "--prompt: it is blank")
    assert "model:" not in outcome.err


def test_one_source_of_prompts(infer):
    outcome = infer("--prompt", "a", "--prompt_file", "b")
    assert outcome.status == 2
    assert "not allowed with argument --prompt" in outcome.err


def test_a_truncated_prompt(infer):
    outcome = infer("--prompt", "the dog " * 200, "--truncate", "middle", *SHORT)
    assert outcome.status == 0, outcome.err
    assert "tokens cut from the middle of a prompt of" in outcome.err
    assert "60 of 64 tokens of context used" in outcome.err


class TestManyPrompts:
    PROMPTS = ("The dog", "Half of the heads", "Long before")

    @pytest.fixture
    def asked(self, tmp_path):
        return write_lines(
            tmp_path / "in.jsonl", *({"prompt": text, "id": at} for at, text in enumerate(self.PROMPTS))
        )

    def test_each_has_its_completion(self, infer, asked, base_folder, tokenizer, tmp_path):
        outcome = infer("--input_jsonl", asked, "--output_jsonl", tmp_path / "out.jsonl", *SHORT)
        assert outcome.status == 0, outcome.err
        assert "3/3" in outcome.err, "the progress bar"
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        for at, row in enumerate(read_lines(tmp_path / "out.jsonl")):
            ids = tokenizer(self.PROMPTS[at]).input_ids
            answer = stock(model, ids, max_new_tokens=4)
            text = tokenizer.decode(answer, skip_special_tokens=True)
            assert row["completion_tokens"] == len(answer) <= 4, "not those of its text, which may be cut in letters"
            assert (row["prompt"], row["id"], row["prompt_tokens"]) == (self.PROMPTS[at], at, len(ids))
            assert row["completion"] == text

    def test_a_resumed_run_samples_the_same(self, infer, asked, tmp_path):
        words = ("--max_new_tokens", 8, "--temperature", 2)
        infer("--input_jsonl", asked, "--output_jsonl", tmp_path / "complete.jsonl", *words)
        complete = (tmp_path / "complete.jsonl").read_bytes()
        (tmp_path / "cut.jsonl").write_bytes(complete[: complete.index(b"\n") + 20])
        infer("--input_jsonl", asked, "--output_jsonl", tmp_path / "cut.jsonl", *words)
        assert (tmp_path / "cut.jsonl").read_bytes() == complete
        assert len(complete.splitlines()) == 3

    def test_too_long_a_prompt_is_refused_before_any_is_answered(self, infer, tmp_path):
        asked = write_lines(tmp_path / "in.jsonl", {"prompt": "The dog"}, {"prompt": "the dog " * 200})
        outcome = infer("--input_jsonl", asked, "--output_jsonl", tmp_path / "out.jsonl")
        refused(outcome, "in.jsonl: prompt 2 has", "context is 64", "--truncate")
        assert not (tmp_path / "out.jsonl").exists()

    def test_a_batch_gives_the_same_file(self, infer, asked, tmp_path):
        for name, words in (("greedy", SHORT), ("sampled", ("--max_new_tokens", 8, "--temperature", 2))):
            files = [tmp_path / f"{name}-{size}.jsonl" for size in (1, 2)]
            for size, file in enumerate(files, 1):
                outcome = infer("--input_jsonl", asked, "--output_jsonl", file, "--batch_size", size, *words)
                assert outcome.status == 0, outcome.err
            assert files[0].read_bytes() == files[1].read_bytes()

    @pytest.mark.parametrize("is_merged", [False, True])
    def test_an_adapter_that_was_trained_on(self, is_merged, infer, asked, tmp_path, own_base, adapter_folder):
        """The folder has the same name."""
        folder = own_base if is_merged else Path(shutil.copytree(adapter_folder, tmp_path / "run"))
        record = json.loads((adapter_folder / "longqlora.json").read_text())
        record |= {"merged_from": "run", "merged_sha256": "1", "files": {}}
        if is_merged:
            (folder / "longqlora.json").write_text(json.dumps(record))
        words = ("--input_jsonl", asked, "--output_jsonl", tmp_path / "out.jsonl", *SHORT)
        words += ("--model_name_or_path", folder)
        for _ in range(2):
            outcome = infer(*words)
            assert outcome.status == 0, outcome.err
        if is_merged:
            (folder / "longqlora.json").write_text(json.dumps(record | {"merged_sha256": "2"}))
        else:
            weights = load_file(folder / "adapter_model.safetensors")
            save_file(
                {name: 2 * tensor for name, tensor in weights.items()},
                folder / "adapter_model.safetensors",
                {"format": "pt"},
            )
        refused(infer(*words), "--output_jsonl", "were made with an adapter with the sha256")

    def test_a_model_that_was_replaced(self, infer, asked, tmp_path, own_base):
        words = ("--input_jsonl", asked, "--output_jsonl", tmp_path / "out.jsonl", *SHORT)
        words += ("--model_name_or_path", own_base)
        assert [infer(*words).status for _ in range(2)] == [0, 0]
        file = own_base / "model.safetensors"
        save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        refused(infer(*words), "--output_jsonl", "were made with weights, config and tokenizer of the base")

    def test_quantized_answers_depend_on_the_tokens_per_forward_pass(self, infer, asked, tmp_path, monkeypatch):
        """Which ones fit may have changed when a run is resumed."""
        for cache in ("int8", "dynamic"):
            words = ("--input_jsonl", asked, "--output_jsonl", tmp_path / f"{cache}.jsonl", *SHORT)
            words += ("--cache_implementation", cache)
            assert infer(*words).status == 0
            with monkeypatch.context() as patch:
                patch.setattr("component.inference.load.best_chunk", lambda *_: None)
                outcome = infer(*words)
            if cache == "dynamic":
                assert outcome.status == 0, outcome.err
            else:
                refused(outcome, "tokens per forward pass, by free GPU memory: 4096, not 512")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (("--max_new_tokens", 5), "were made with --max_new_tokens 4, not 5; use the same settings"),
            (("--do_sample", "true"), "were made with --do_sample false, not true"),
            (("--stop", "x"), '--stop null, not ["x"]'),
        ],
    )
    def test_a_run_with_other_settings_does_not_go_on(self, changes, message, infer, asked, tmp_path):
        """K9f: refused before the model is loaded."""
        words = ("--input_jsonl", asked, "--output_jsonl", tmp_path / "out.jsonl", *SHORT)
        infer(*words)
        before = (tmp_path / "out.jsonl").read_bytes()
        outcome = infer(*words, *changes)
        refused(outcome, "--output_jsonl", message)
        assert "model:" not in outcome.err
        assert (tmp_path / "out.jsonl").read_bytes() == before
        assert infer(*words, "--batch_size", 3).status == 0, "what changes no answer may change"

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_no_file_of_the_model_is_overwritten(self, name, infer, asked, base_folder):
        """K7."""
        before = (base_folder / name).read_bytes()
        outcome = infer("--input_jsonl", asked, "--output_jsonl", base_folder / name)
        refused(outcome, "--output_jsonl", "would be overwritten, but --model_name_or_path reads it")
        assert (base_folder / name).read_bytes() == before

    def test_a_batch_of_one_prompt(self, infer):
        refused(infer("--prompt", "a", "--batch_size", 2), "--batch_size: 2, but there is no --input_jsonl")
        refused(infer("--prompt", "a", "--batch_size", 0), "--batch_size: 0; use at least 1")

    def test_a_batch_whose_answers_would_differ_is_refused_before_loading(self, infer, asked, tmp_path):
        words = ("--input_jsonl", asked, "--output_jsonl", tmp_path / "out.jsonl", "--batch_size", 2)
        outcome = infer(*words, "--cache_implementation", "int8")
        refused(
            outcome, "--batch_size: 2, but --cache_implementation int8 quantizes rows together; use --batch_size 1"
        )
        assert "model:" not in outcome.err
        assert [path.name for path in tmp_path.glob("out*")] == []

    def test_input_without_output(self, infer, asked):
        refused(infer("--input_jsonl", asked), "--input_jsonl and --output_jsonl belong together")


class TestInference:
    def test_quiet(self, infer, tmp_path):
        outcome = infer("--prompt", "The dog", *SHORT, "--quiet")
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome.out.strip()
        asked = write_lines(tmp_path / "in.jsonl", {"prompt": "The dog"})
        words = ("--quiet", "--input_jsonl", asked, "--output_jsonl")
        outcome = infer(*words, tmp_path / "out.jsonl", *SHORT)
        assert (outcome.status, outcome.err) == (0, "")
        outcome = infer(*words, tmp_path)
        assert outcome.err.splitlines() == [f"error: --output_jsonl: {tmp_path} is a folder; name a file"]

    def test_a_missing_prompt_file_is_found_before_loading(self, run_program, base_folder):
        """K21."""
        outcome = run_program(INFERENCE, "--model_name_or_path", base_folder, "--prompt_file", "no/such.txt")
        refused(outcome, "--prompt_file: there is no file no/such.txt")
        assert "model:" not in outcome.err

    def test_all_of_standard_input_is_one_prompt(self, run_program, base_folder, prompts_seen, tokenizer):
        text = "The dog.\n\nAnd the «fox»"
        outcome = run_program(INFERENCE, "--model_name_or_path", base_folder, stdin=text.encode())
        assert outcome.status == 0
        assert prompts_seen == [tokenizer(text).input_ids]
        assert prompts_seen[0][0] == tokenizer.bos_token_id

    def test_special_tokens_in_a_prompt_are_text(self, run_program, base_folder, prompts_seen, tokenizer):
        """K9e: </s> in a prompt ended it for the model."""
        run_program(INFERENCE, "--model_name_or_path", base_folder, "--prompt", "What is </s>?")
        (ids,) = prompts_seen
        assert (ids[0], tokenizer.decode(ids[1:])) == (tokenizer.bos_token_id, "What is </s>?")
        assert tokenizer.eos_token_id not in ids

    def test_a_prompt_file(self, run_program, base_folder, prompts_seen, tokenizer, tmp_path):
        (tmp_path / "book.txt").write_text("The dog.")
        run_program(INFERENCE, "--model_name_or_path", base_folder, "--prompt_file", tmp_path / "book.txt")
        assert prompts_seen == [tokenizer("The dog.").input_ids]


PIPES = {
    INFERENCE: (["--adapter_name_or_path", "{adapter}"], b"The quick brown"),
    CHAT: (["--model_name_or_path", "{base}", "--context_size", "512"], b"One?\nTwo?\n"),
}


@pytest.mark.parametrize("program", PIPES, ids=["inference", "chat"])
def test_a_pipe_into_a_real_process_ends_with_status_0(program, adapter_folder, base_folder, tmp_path):
    words, stdin = PIPES[program]
    words = [word.format(adapter=adapter_folder, base=base_folder) for word in words]
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *words, *GREEDY, "--max_new_tokens", "3"],
        input=stdin,
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    if program == CHAT:
        assert done.stdout.count(b"ASSISTANT: ") == 2
        return
    model, tokenizer = load_for_inference(None, str(adapter_folder))
    ids = stock(model, tokenizer(stdin.decode()).input_ids, max_new_tokens=3)
    assert done.stdout.decode() == tokenizer.decode(ids, skip_special_tokens=True) + "\n", "only the generated text"


@pytest.mark.parametrize("program", [INFERENCE, CHAT], ids=["inference", "chat"])
@pytest.mark.parametrize("stdin", [b"", b"\n \n"], ids=["nothing", "blank lines"])
def test_empty_input_is_not_an_error(program, stdin, run_program, base_folder):
    outcome = run_program(program, "--model_name_or_path", base_folder, stdin=stdin)
    assert (outcome.status, outcome.out.strip()) == (0, "")
