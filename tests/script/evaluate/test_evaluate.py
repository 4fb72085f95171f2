"""evaluate.py: its tables, its JSON, and the same numbers from several processes.

python -m pytest tests/script/evaluate/test_evaluate.py -m slow     # torchrun with two processes
"""

import errno
import json
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

import component.evaluate.model_spec
from component.data.token_file import write_tokens
from component.evaluate.perplexity import measure_perplexity
from component.storage.claim import claimed
from tests.conftest import ROOT
from tests.outcome import refused_by_us
from tests.processes import torchrun
from tests.reference.long_ppl import key_tokens, log_likelihoods
from tests.reference.longlora_perplexity import longlora_perplexity

EVALUATE = "script/evaluate/evaluate.py"
IDS = np.random.default_rng(0).integers(2, 384, 150).tolist()
DOCUMENTS = [IDS[:20], IDS[20:21], IDS[21:100], IDS[100:]]
FIELDS = ["protocol", "seq_len", "stride", "windows", "tokens_scored", "loss", "perplexity", "by_position"]
FIELDS += ["by_document", "processes", "seconds", "tokens_per_second", "peak_allocated_gib", "peak_reserved_gib"]
FIELDS += ["long_ppl", "key_tokens", "key_token_share"]
RULE = ["--long_ppl_context", 8, "--long_ppl_stride", 5, "--long_ppl_alpha", 0.15, "--long_ppl_beta", -7]
LONG_PPL = ["--long_ppl", *RULE]


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
        assert (row["long_ppl"], row["key_tokens"]) == (None, None)
    assert "LongPPL" not in printed
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


def test_a_length_that_is_named_twice_is_measured_once(evaluate, base_folder):
    found, _ = evaluate("--base_model", base_folder, "--seq_len", 32, 16, 32)
    assert [row["seq_len"] for row in found["results"]] == [32, 16]


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
    printed = torchrun(EVALUATE, processes, *words, "--output_json", tmp_path / "several.json")
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
    torchrun(EVALUATE, processes, *words)
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


# ---- LongPPL


def defined(evaluator: Path, measured: Path, seq_len: int) -> tuple[list[list[int]], float]:
    """Key tokens by window, and LongPPL, under protocol longlora with windows side by side."""
    models = [LlamaForCausalLM.from_pretrained(folder).eval() for folder in (evaluator, measured)]
    of_last = log_likelihoods(models[1])
    texts = [IDS[start : start + seq_len] for start in range(0, len(IDS) - seq_len, seq_len)][:-1]
    keys = [key_tokens(models[0], ids, 8, 5, 0.15, -7.0) for ids in texts]
    losses = [-of_last(ids[: key + 1]) for ids, found in zip(texts, keys, strict=True) for key in found]
    return keys, math.exp(sum(losses) / len(losses))


@pytest.fixture
def other_base(tmp_path, base_folder) -> Path:
    """Another model with the same tokenizer."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "other"))
    model = LlamaForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    return folder


def test_long_ppl_of_a_model_that_is_its_own_evaluator(evaluate, base_folder):
    found, printed = evaluate("--base_model", base_folder, "--seq_len", 13, 31, 48, *LONG_PPL)
    short, *long = found["results"]
    assert (short["long_ppl"], short["key_tokens"], short["key_token_share"]) == (None, 0, 0.0)
    assert "no LongPPL at seq_len 13: the first 13 tokens of a window can't be key" in printed
    assert printed.count("no LongPPL") == 1
    for row in long:
        keys, expected = defined(base_folder, base_folder, row["seq_len"])
        assert row["key_tokens"] == sum(map(len, keys)) > 3
        assert row["key_token_share"] == row["key_tokens"] / row["tokens_scored"]
        assert row["long_ppl"] == pytest.approx(expected, rel=1e-5)
        assert f"{row['long_ppl']:.4f}  {row['key_tokens']:>10}  {100 * row['key_token_share']:.2f} %" in printed
    assert found["evaluator"] == str(base_folder)
    names = [f"long_ppl_{name}" for name in ("context", "stride", "alpha", "beta")]
    assert [found[name] for name in names] == [8, 5, 0.15, -7.0]


def test_no_key_token_is_said(evaluate, base_folder):
    found, printed = evaluate("--base_model", base_folder, "--seq_len", 31, "--long_ppl", *RULE[:4])
    assert (found["results"][0]["long_ppl"], found["results"][0]["key_tokens"]) == (None, 0)
    assert "no LongPPL at seq_len 31: no token is key" in printed
    assert "nan" not in printed
    assert (found["long_ppl_alpha"], found["long_ppl_beta"]) == (2.0, -2.0)


def test_one_set_of_key_tokens_for_all_models(evaluate, base_folder, other_base, tmp_path, monkeypatch):
    """The evaluator is loaded first and alone; a second run reads its file, and loads no evaluator."""
    loaded, load = [], component.evaluate.model_spec.load_model

    def load_alone(base, *words, **options):
        assert [model for _, model in loaded if model() is not None] == []
        model = load(base, *words, **options)
        loaded.append((base, weakref.ref(model)))
        return model

    monkeypatch.setattr(component.evaluate.model_spec, "load_model", load_alone)
    words = ["--seq_len", 31, 13, *LONG_PPL, "--key_tokens", tmp_path / "keys.json"]
    models = [f"base={base_folder}", f"other={other_base}"]
    found, printed = evaluate("--compare", *models, "--evaluator", "other", *words)
    assert [base for base, _ in loaded] == [str(other_base), str(base_folder), str(other_base)]
    for model, folder in zip(found["models"], (base_folder, other_base), strict=True):
        keys, expected = defined(other_base, folder, 31)
        assert model["evaluator"] == str(other_base)
        assert model["results"][0]["key_tokens"] == sum(map(len, keys)) > 3
        assert model["results"][0]["long_ppl"] == pytest.approx(expected, rel=1e-5)
        assert [model["results"][1][name] for name in ("long_ppl", "key_tokens")] == [None, 0]
    assert keys != defined(base_folder, base_folder, 31)[0]
    table = printed[printed.index("LongPPL at a window of") :].splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["base", "other"]
    assert [line.split()[1:] for line in table[1:3]] == [
        [f"{model['results'][0]['long_ppl']:.4f}", "-"] for model in found["models"]
    ]
    kept = json.loads((tmp_path / "keys.json").read_text())
    assert [row["positions"] for row in kept["lengths"]] == [keys, [[]] * 10]

    loaded.clear()
    before = (tmp_path / "keys.json").read_bytes()
    again, _ = evaluate("--base_model", base_folder, *words)
    assert [base for base, _ in loaded] == [str(base_folder)]
    assert again["evaluator"] == str(other_base)
    assert without_times(again["results"]) == without_times(found["models"][0]["results"])
    assert (tmp_path / "keys.json").read_bytes() == before, "also with --overwrite"


def test_a_model_keeps_its_own_key_tokens(evaluate, base_folder, adapter_folder, tmp_path):
    words = ["--seq_len", 31, *LONG_PPL, "--key_tokens", tmp_path / "keys.json"]
    evaluate("--base_model", base_folder, "--evaluator", base_folder, *words)
    kept = json.loads((tmp_path / "keys.json").read_text())
    keys, _ = defined(base_folder, base_folder, 31)
    assert kept["lengths"] == [
        {"seq_len": 31, "sliding_window": 31, "windows": 3, "key_tokens": sum(map(len, keys)), "positions": keys}
    ]
    found, _ = evaluate("--peft_model", adapter_folder, *words)
    assert found["results"][0]["key_tokens"] == sum(map(len, keys))
    (tmp_path / "keys.json").unlink()
    found, _ = evaluate("--peft_model", adapter_folder, *words)
    own = json.loads((tmp_path / "keys.json").read_text())
    assert found["evaluator"] == own["evaluator"] == str(adapter_folder)
    assert own["lengths"][0]["positions"] != keys


@pytest.mark.parametrize("named", [(), ("--evaluator", "{folder}")])
def test_key_tokens_of_other_weights_of_the_same_name(named, evaluate, run_program, tokens, base_folder, tmp_path):
    """Another model may use them: they are those of the evaluator as it was."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "model"))
    words = ["--seq_len", 31, *LONG_PPL, "--key_tokens", tmp_path / "keys.json"]
    words += [word.format(folder=folder) for word in named]
    (first,) = evaluate("--base_model", folder, *words)[0]["results"]
    assert evaluate("--base_model", folder, *words)[0]["results"][0]["long_ppl"] == first["long_ppl"]
    file = folder / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    outcome = run_program(EVALUATE, "--data_path", tokens, "--base_model", folder, *words)
    refused_by_us(outcome, "--key_tokens", f"was found by other weights of {folder}; name a new file")
    outcome = run_program(EVALUATE, "--data_path", tokens, "--compare", f"a={base_folder}", *words)
    refused_by_us(outcome, f"was found by other weights of {folder}")
    shutil.rmtree(folder)
    if not named:
        (other,) = evaluate("--base_model", base_folder, *words)[0]["results"]
        assert other["long_ppl"] == first["long_ppl"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--seq_len", 48], ["--seq_len 31 (here 48)"]),
        (["--sliding_window", 9], ["--sliding_window 31 at --seq_len 31 (here 9)"]),
        (["--protocol", "sliding"], ["--protocol longlora (here sliding)", "3 windows at --seq_len 31 (here 5)"]),
        (["--long_ppl_context", 9], ["--long_ppl_context 8 (here 9)"]),
        (["--long_ppl_stride", 4], ["--long_ppl_stride 5 (here 4)"]),
        (["--long_ppl_alpha", 0.25], ["--long_ppl_alpha 0.15 (here 0.25)"]),
        (["--long_ppl_beta", -5], ["--long_ppl_beta -7.0 (here -5.0)"]),
        (["--evaluator", "{other}"], ["--evaluator {base} (here {other})"]),
        (["--data_path", "{moved}"], ["--data_path {tokens} (here {moved}, with other content)"]),
    ],
)
def test_key_tokens_of_something_else_are_refused(
    words, parts, evaluate, run_program, base_folder, other_base, tokens, tmp_path
):
    moved = Path(shutil.copy(tokens, tmp_path / "moved.bin"))
    names = {"base": base_folder, "other": other_base, "tokens": tokens, "moved": moved}
    common = ["--base_model", base_folder, "--seq_len", 31, *LONG_PPL, "--key_tokens", tmp_path / "keys.json"]
    evaluate(*common)
    assert run_program(EVALUATE, *common, "--data_path", moved).status == 0, "the same content in another place"
    np.array([5, *IDS[1:]], dtype=np.uint16).tofile(moved)
    outcome = run_program(EVALUATE, "--data_path", tokens, *common, *[str(word).format(**names) for word in words])
    assert outcome.status == 1
    assert f"--key_tokens: {tmp_path}/keys.json holds the key tokens of " in outcome.err
    for part in parts:
        assert part.format(**names) in outcome.err, outcome.err
    assert outcome.err.count("(here") == len(parts)
    assert "Loading weights" not in outcome.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--evaluator", "{base}"], ["--evaluator: {base} has no effect without --long_ppl"]),
        (["--long_ppl_alpha", 0], ["--long_ppl_alpha: 0.0 has no effect without --long_ppl"]),
        (["--long_ppl", "--long_ppl_context", 0], ["--long_ppl_context: 0; use at least 1"]),
        (["--long_ppl", "--long_ppl_stride", 0], ["--long_ppl_stride: 0; use at least 1"]),
        (["--long_ppl", "--long_ppl_alpha", -1], ["--long_ppl_alpha: -1.0; use at least 0"]),
        (["--long_ppl", "--long_ppl_alpha", "nan"], ["--long_ppl_alpha: nan; use a finite"]),
        (["--long_ppl", "--long_ppl_beta", "inf"], ["--long_ppl_beta: inf; use a finite"]),
        (["--long_ppl", "--evaluator", "{base}:"], ["--evaluator: '{base}:'; use MODEL or MODEL:ADAPTER"]),
        (["--long_ppl", "--evaluator", "/no/such"], ["--evaluator", "/no/such"]),
        (
            ["--long_ppl", "--evaluator", "{retold}"],
            ["--evaluator: the tokenizer of {retold} gives other ids than that of {base}"],
        ),
        (
            ["--long_ppl", "--seq_len", 65],
            ["--evaluator: {base} has a context of 64 tokens, but windows have 65; shorten"],
        ),
        (
            ["--long_ppl", "--seq_len", 100, "--sliding_window", 16, "--evaluator", "{base}"],
            ["--evaluator: {base} has a context of 64 tokens, but windows have 100"],
        ),
        (["--long_ppl", "--key_tokens", "{out}"], ["is written by --output_json too"]),
        (["--long_ppl", "--key_tokens", "{base}/config.json"], ["config.json is no file of key tokens"]),
        (["--long_ppl", "--key_tokens", "{tokens}"], ["tokens.bin is no file of key tokens", "name another one"]),
    ],
)
def test_mistakes_about_key_tokens(words, parts, run_program, tokens, base_folder, tmp_path):
    retold = Path(shutil.copytree(base_folder, tmp_path / "retold"))
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(retold)
    names = {"base": base_folder, "retold": retold, "out": tmp_path / "out.json", "tokens": tokens}
    words = [str(word).format(**names) for word in ["--base_model", "{base}", "--seq_len", 16, *words]]
    outcome = run_program(EVALUATE, "--data_path", tokens, "--output_json", names["out"], *words)
    assert outcome.status == 1
    assert all(part.format(**names) in outcome.err for part in parts), outcome.err
    assert "Loading weights" not in outcome.err
    assert not names["out"].exists()


def test_an_evaluator_of_another_tokenizer_than_the_models(run_program, tokens, base_folder, tmp_path):
    """The file does not say whose tokens it holds."""
    Path(f"{tokens}.json").unlink()
    other = Path(shutil.copytree(base_folder, tmp_path / "retold"))
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(other)
    words = ["--data_path", tokens, "--base_model", base_folder, "--seq_len", 31, *LONG_PPL, "--evaluator", other]
    outcome = run_program(EVALUATE, *words)
    assert outcome.status == 1
    assert f"--evaluator: the tokenizer of {other} gives other ids than that of {base_folder}" in outcome.err
    assert "Loading weights" not in outcome.err


def test_models_in_one_table_need_one_evaluator(run_program, tokens, base_folder, other_base):
    words = ["--data_path", tokens, "--seq_len", 31, *LONG_PPL]
    outcome = run_program(EVALUATE, *words, "--compare", f"a={base_folder}", f"b={other_base}")
    assert outcome.status == 1
    assert "--evaluator: missing; all models of --compare are measured on the same key tokens" in outcome.err
    assert "Loading weights" not in outcome.err


@pytest.mark.slow  # fast: tests/component/evaluate/test_long_ppl.py, in several processes
@pytest.mark.parametrize("parts", [1, 2], ids=["windows are shared out", "each window is split"])
def test_key_tokens_of_several_processes(parts, tokens, tmp_path, base_folder, other_base):
    words = ["--base_model", base_folder, "--data_path", tokens, "--seq_len", 31, *LONG_PPL]
    words += ["--evaluator", other_base, "--key_tokens", tmp_path / "keys.json", "--output_json", tmp_path / "r.json"]
    torchrun(EVALUATE, 2, *words, "--sequence_parallel_size", parts)
    (row,) = json.loads((tmp_path / "r.json").read_text())["results"]
    keys, expected = defined(other_base, base_folder, 31)
    assert json.loads((tmp_path / "keys.json").read_text())["lengths"][0]["positions"] == keys
    assert (row["processes"], row["key_tokens"]) == (2, sum(map(len, keys)))
    assert row["long_ppl"] == pytest.approx(expected, rel=1e-5)
    torchrun(
        EVALUATE, 2, *words[:-1], tmp_path / "again.json", "--sequence_parallel_size", parts
    )  # both read the file
    assert json.loads((tmp_path / "again.json").read_text())["results"][0]["long_ppl"] == row["long_ppl"]


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
