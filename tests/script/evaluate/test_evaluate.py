"""evaluate.py: its tables, its JSON, and the same numbers from several processes.

python -m pytest tests/script/evaluate/test_evaluate.py -m slow     # torchrun with two processes
"""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import component.evaluate.model_spec
from component.data.token_file import write_tokens
from component.evaluate.perplexity import measure_perplexity
from component.storage.claim import claimed
from tests.conftest import ROOT
from tests.reference.longlora_perplexity import longlora_perplexity

EVALUATE = "script/evaluate/evaluate.py"
IDS = np.random.default_rng(0).integers(2, 384, 150).tolist()
DOCUMENTS = [IDS[:20], IDS[20:21], IDS[21:100], IDS[100:]]
FIELDS = ["protocol", "seq_len", "stride", "windows", "tokens_scored", "loss", "perplexity", "by_position"]
FIELDS += ["by_document", "processes", "seconds", "tokens_per_second", "peak_allocated_gib", "peak_reserved_gib"]


@pytest.fixture
def tokens(tmp_path, base_folder) -> Path:
    """A token file of four documents, with an index."""
    path = tmp_path / "tokens.bin"
    write_tokens(path, DOCUMENTS, AutoTokenizer.from_pretrained(base_folder), name="tiny", bos="none", eos="none")
    return path


@pytest.fixture
def evaluate(run_program, tmp_path, tokens):
    """Runs the program; returns its JSON and its output."""

    def run(*words: object) -> tuple[dict, str]:
        file = tmp_path / "result.json"
        outcome = run_program(EVALUATE, "--data_path", tokens, "--output_json", file, "--overwrite", *words)
        assert outcome.status == 0, outcome.err
        return json.loads(file.read_text(), parse_constant=pytest.fail), outcome.out

    return run


def test_everything_is_in_the_json(evaluate, base_folder, tokens):
    found, printed = evaluate("--base_model", base_folder, "--seq_len", 16, 48, "--position_buckets", 4)
    model = LlamaForCausalLM.from_pretrained(base_folder).eval()
    assert [row["seq_len"] for row in found["results"]] == [16, 48]
    for row in found["results"]:
        assert list(row) == FIELDS
        expected = longlora_perplexity(model, IDS, row["seq_len"], row["seq_len"])
        assert row["perplexity"] == pytest.approx(expected, rel=1e-4)
        assert f"{row['perplexity']:.4f}" in printed
        assert len(row["by_position"]) == 4
        assert row["peak_allocated_gib"] is None
    by_document = found["results"][0]["by_document"]
    assert [(d["document"], d["start"], d["tokens"]) for d in by_document] == [
        (0, 0, 18),
        (1, 20, 1),
        (2, 21, 74),
        (3, 100, 27),
    ]
    assert "3 documents" in printed, "in the longest windows, of which the last is left out"
    assert found | {"results": 0, "command": 0, "hardware": 0, "date": 0, "versions": 0} == {
        "base_model": str(base_folder),
        "peft_model": None,
        "data_path": str(tokens),
        "tokenizer": "the file's",
        "protocol": "longlora",
        "weights": "float32",
        "dtype": "float32",
        "attention": "full (sdpa)",
        "rope_type": "default",
        "rope_factor": 1.0,
        "rope_theta": 10000.0,
        "context_tokens": 64,
        **dict.fromkeys(["results", "command", "hardware", "date", "versions"], 0),
    }
    assert found["command"].startswith("python script/evaluate/evaluate.py --data_path")


def test_the_originals_flags(evaluate, base_folder, adapter_folder):
    found, _ = evaluate(
        "--batch_size", 2, "--base_model", base_folder, "--peft_model", adapter_folder, "--seq_len", 32,
        "--context_size", 128, "--sliding_window", 16, "--low_rank_training", "False", "--dtype", "float32",
        "--protocol", "sliding", "--load_in_4bit", "false", "--position_buckets", 0,
    )  # fmt: skip
    (row,) = found["results"]
    assert (row["protocol"], row["stride"], row["tokens_scored"]) == ("sliding", 16, 149)
    assert row["by_position"] == []
    assert (found["rope_type"], found["rope_factor"]) == ("linear", 2.0)


def test_infinite_perplexity_is_null(evaluate, tmp_path, tiny_llama):
    tiny_llama.lm_head.weight.data.mul_(1e6)
    tiny_llama.save_pretrained(tmp_path / "hopeless")
    found, printed = evaluate("--base_model", tmp_path / "hopeless", "--seq_len", 16)
    assert found["results"][0]["perplexity"] is None
    assert found["results"][0]["loss"] > 700
    assert "inf" in printed
    assert f"not checked: {tmp_path}/hopeless holds none" in printed, "a model folder without a tokenizer"


class TestCompare:
    def test_one_table(self, evaluate, base_folder, adapter_folder):
        names = [f"base={base_folder}", f"scaled={base_folder}@128", f"our own={adapter_folder}"]
        found, printed = evaluate("--compare", *names, "--seq_len", 16, 32)
        assert [model["name"] for model in found["models"]] == ["base", "scaled", "our own"]
        assert [model["rope_factor"] for model in found["models"]] == [1.0, 2.0, 2.0]
        table = printed[printed.index("perplexity at a window of") :].splitlines()
        assert table[0].split()[-2:] == ["16", "32"]
        seen = set()
        for model, line in zip(found["models"], table[1:4], strict=True):
            cells = [f"{row['perplexity']:.4f}" for row in model["results"]]
            assert line.split() == [*model["name"].split(), *cells]
            seen.update(cells)
        assert len(seen) == 6, "all three models differ"

    def test_each_equals_its_own_evaluation(self, evaluate, base_folder, adapter_folder):
        together, _ = evaluate("--compare", f"ours={adapter_folder}", f"base={base_folder}", "--seq_len", 16)
        for model, words in zip(
            together["models"], (["--peft_model", adapter_folder], ["--base_model", base_folder]), strict=True
        ):
            alone, _ = evaluate(*words, "--seq_len", 16)
            assert without_times(model["results"]) == without_times(alone["results"])

    def test_one_model_in_memory_at_a_time(self, evaluate, base_folder, adapter_folder, monkeypatch):
        loaded, load = [], component.evaluate.model_spec.load_model

        def load_alone(*words, **options):
            assert [model for model in loaded if model() is not None] == []
            model = load(*words, **options)
            loaded.append(weakref.ref(model))
            return model

        monkeypatch.setattr(component.evaluate.model_spec, "load_model", load_alone)
        evaluate("--compare", f"a={base_folder}", f"b={adapter_folder}", f"c={base_folder}@128", "--seq_len", 16)
        assert len(loaded) == 3

    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            (["--compare", "x"], ["--compare", "'x'", "NAME=MODEL"]),
            (["--compare", "x=/no/such"], ["--compare x", "/no/such"]),
            (["--compare", "x={base}", "x={base}@128"], ["--compare", "x names 2 models", "its own"]),
            (["--compare", "x={base}", "--base_model", "{base}"], ["--base_model", "beside --compare", "leave"]),
            (["--compare", "x={base}", "--context_size", "128"], ["--context_size", "128", "beside --compare"]),
            (["--base_model", "{base}", "--context_size", "0"], ["--context_size", "0", "at least 1"]),
            (["--base_model", "{base}", "--position_buckets", "-1"], ["--position_buckets", "-1", "at least 0"]),
        ],
    )
    def test_mistakes(self, words, parts, run_program, tokens, base_folder):
        words = [word.format(base=base_folder) for word in words]
        outcome = run_program(EVALUATE, "--data_path", tokens, "--seq_len", 16, *words)
        assert outcome.status == 1
        assert all(part in outcome.err for part in parts), outcome.err
        assert "Loading weights" not in outcome.err, "before anything is loaded"

    def test_too_long_a_window(self, run_program, tokens, base_folder, monkeypatch):
        """Refused before the shorter ones are measured."""
        monkeypatch.setattr("component.evaluate.perplexity.measure_perplexity", None)
        outcome = run_program(EVALUATE, "--data_path", tokens, "--base_model", base_folder, "--seq_len", 16, 100)
        assert outcome.status == 1
        assert "150 tokens hold no window of seq_len 100" in outcome.err

    def test_a_model_of_another_tokenizer(self, run_program, tokens, tmp_path, base_folder, tiny_llama):
        other = AutoTokenizer.from_pretrained(base_folder)
        other.add_tokens(["<other>"])
        tiny_llama.save_pretrained(tmp_path / "other")
        other.save_pretrained(tmp_path / "other")
        words = ["--compare", f"base={base_folder}", f"other={tmp_path}/other"]
        outcome = run_program(EVALUATE, "--data_path", tokens, "--seq_len", 16, *words)
        assert outcome.status == 1
        assert "tokens.bin was made by the tokenizer tiny" in outcome.err
        assert outcome.out == "", "nothing was measured"


def without_times(results: list[dict]) -> list[dict]:
    return [{**row, "processes": 0, "seconds": 0, "tokens_per_second": 0} for row in results]


def torchrun(processes: int, *words: object) -> str:
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, EVALUATE, *map(str, words)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("batch_size", "protocol", "processes"),
    [
        (1, "longlora", 2),
        pytest.param(3, "sliding", 2, marks=pytest.mark.slow),
        pytest.param(1, "sliding", 3, marks=pytest.mark.slow),
    ],
)
def test_several_processes_give_the_same_numbers(batch_size, protocol, processes, tokens, tmp_path, base_folder):
    """Bit-identical; printed once and written once."""
    words = ["--base_model", base_folder, "--data_path", tokens, "--seq_len", 16, 64, "--sliding_window", 11]
    words += ["--batch_size", batch_size, "--protocol", protocol]
    printed = torchrun(processes, *words, "--output_json", tmp_path / "several.json")
    found = json.loads((tmp_path / "several.json").read_text())
    assert [row["processes"] for row in found["results"]] == [processes, processes]
    model = LlamaForCausalLM.from_pretrained(base_folder).eval()
    for row in found["results"]:
        alone = measure_perplexity(
            model, np.array(IDS), seq_len=row["seq_len"], stride=11, protocol=protocol, batch_size=batch_size,
            document_starts=[0, 20, 21, 100],
        )  # fmt: skip
        assert alone.windows > 2 * processes
        assert row["loss"] == alone.loss
        assert row["perplexity"] == alone.perplexity
        assert [bucket["loss"] for bucket in row["by_position"]] == [
            None if math.isnan(bucket.loss) else bucket.loss for bucket in alone.by_position
        ]
        assert [document["loss"] for document in row["by_document"]] == [d.loss for d in alone.by_document]
        assert printed.count(f"{row['perplexity']:.4f}") == 1
    assert torch.get_num_threads() == 1, "as in the processes: another order of summation would change the last bits"


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_windows_that_two_processes_share(processes, tokens, tmp_path, base_folder):
    words = ["--base_model", base_folder, "--data_path", tokens, "--seq_len", 16, 63, "--sliding_window", 11]
    words += ["--sequence_parallel_size", 2, "--output_json", tmp_path / "shared.json"]
    torchrun(processes, *words)
    found = json.loads((tmp_path / "shared.json").read_text())
    assert found["sequence_parallel_size"] == 2
    model = LlamaForCausalLM.from_pretrained(base_folder).eval()
    for row in found["results"]:
        alone = measure_perplexity(model, np.array(IDS), seq_len=row["seq_len"], stride=11)
        assert (row["processes"], row["windows"], row["tokens_scored"]) == (
            processes,
            alone.windows,
            alone.tokens_scored,
        )
        assert row["perplexity"] == pytest.approx(alone.perplexity, rel=1e-5)


def test_processes_that_no_window_can_be_shared_by(run_program, tokens, base_folder):
    words = ["--base_model", base_folder, "--data_path", tokens, "--seq_len", 16]
    outcome = run_program(EVALUATE, *words, "--sequence_parallel_size", 2)
    assert outcome.status == 1
    assert "--sequence_parallel_size: 2, but this run has 1 process; start a multiple of it with" in outcome.err
    outcome = run_program(EVALUATE, *words, "--sequence_parallel_size", 0)
    assert "--sequence_parallel_size: 0; use at least 1" in outcome.err


# ---- what exists, and what is read, is not overwritten; what is measured is not lost


@pytest.mark.parametrize(
    ("target", "words", "reader"),
    [
        ("tokens.bin", [], "--data_path"),
        ("tokens.bin.json", [], "--data_path"),
        ("linked", [], "--data_path"),
        ("base/config.json", [], "--base_model"),
        ("adapter/longqlora.json", ["--peft_model", "adapter"], "--peft_model"),
        ("base/config.json", ["--compare", "x=base:adapter"], "--compare x"),
    ],
    ids=["K7-bin", "K7-index", "K7-link", "K7-config", "K7-adapter", "K7-compare"],
)
def test_k7_what_is_read_is_not_overwritten(
    target, words, reader, tokens, base_folder, adapter_folder, tmp_path, run_program, monkeypatch
):
    shutil.copytree(base_folder, tmp_path / "base")
    shutil.copytree(adapter_folder, tmp_path / "adapter")
    (tmp_path / "linked").hardlink_to(tokens)
    monkeypatch.chdir(tmp_path)
    model = [] if "--compare" in words else ["--base_model", "base"]
    before = (tmp_path / target).read_bytes()
    outcome = run_program(
        EVALUATE, "--data_path", tokens, "--seq_len", 16, *model, *words, "--output_json", target, "--overwrite"
    )
    assert outcome.status == 1
    assert f"--output_json: {target} would be overwritten, but {reader} reads it" in outcome.err
    assert (tmp_path / target).read_bytes() == before


def test_k7_an_older_result_needs_overwrite(tokens, base_folder, tmp_path, run_program):
    words = ["--data_path", tokens, "--base_model", base_folder, "--seq_len", 16]
    (tmp_path / "r.json").write_text("of last week")
    outcome = run_program(EVALUATE, *words, "--output_json", tmp_path / "r.json")
    assert outcome.status == 1
    assert "r.json exists; name another file, or replace it with --overwrite" in outcome.err
    assert "Loading weights" not in outcome.err
    assert (tmp_path / "r.json").read_text() == "of last week"


def test_k8_one_result_one_program(tokens, base_folder, tmp_path, run_program):
    words = ["--data_path", tokens, "--base_model", base_folder, "--seq_len", 16]
    with claimed({"--theirs": [tmp_path / "r.json"]}, {}):
        outcome = run_program(EVALUATE, *words, "--output_json", tmp_path / "r.json")
    assert outcome.status == 1
    assert "--output_json: another process is writing" in outcome.err


def test_k14_a_measurement_survives_a_full_disk(tokens, base_folder, tmp_path, run_program, monkeypatch):
    """Its JSON is printed, and parses."""

    def full(self, *words, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    words = ["--data_path", tokens, "--base_model", base_folder, "--seq_len", 16, "--position_buckets", 0]
    outcome = run_program(EVALUATE, *words, "--output_json", tmp_path / "r.json")
    assert outcome.status == 1
    assert f"{tmp_path}/r.json can't be written (No space left on device); its content is printed" in outcome.err
    printed = json.loads(outcome.out[outcome.out.index("{") :])
    assert printed["results"][0]["windows"] == 8  # (150 - 16) / 16 = 8.4, of 9 starts the last is left out
    assert not list(tmp_path.glob("*r.json*"))


def test_k14_a_measurement_survives_a_closed_pipe(tokens, base_folder, tmp_path):
    """`evaluate.py ... | head -1`: the tables find no reader, the file is written."""
    words = ["--data_path", tokens, "--base_model", base_folder, "--seq_len", 16, "--output_json", tmp_path / "r.json"]
    program = (
        "import os\nimport script.evaluate.evaluate as e\n"
        "closed = os.pipe()\nos.close(closed[0])\n"
        "measure = e.measure\n"
        "e.measure = lambda *a: (measure(*a), os.dup2(closed[1], 1))[0]\n"
        "e.main()\n"
    )
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 141, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["results"][0]["windows"] == 8
