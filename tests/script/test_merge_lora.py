"""merge_lora.py: the merged model equals the adapter on its base, and loads without any LongQLoRA code."""

import copy
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from component import checkpoint
from component.adapter import add_adapter
from component.checkpoint import write_adapter, write_record
from component.data.token_file import read_tokens
from component.evaluate.perplexity import measure_perplexity
from component.loading import load_model
from component.merge import write as merging
from component.model import load_base, load_config
from component.rope import extend_context
from tests.conftest import ROOT

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "longqlora.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
LENGTHS = (20, 250)  # tokens: within the base's 64 positions, and close to the extended context
EXTENDED = 256
NORMS, EMBEDDINGS = {"train_norm": True}, {"train_embedding": True}
CASES = {
    "lora": {},
    "norms": NORMS,
    "embeddings": EMBEDDINGS,
    "all": NORMS | EMBEDDINGS,
    "tied-lora": {"tied": True},
    "tied-norms": {"tied": True} | NORMS,
    "tied-embeddings": {"tied": True} | EMBEDDINGS,
    "tied-all": {"tied": True} | NORMS | EMBEDDINGS,
    "one-kv-head": {"kv_heads": 1} | NORMS,
    "all-kv-heads": {"kv_heads": 4} | NORMS,
    "biases": {"config_class": Qwen2Config} | NORMS,
    "some-targets": {"target_names": ["q_proj", "down_proj"]},
    "yarn": {"rope_type": "yarn"},
}


def merge(*words: object) -> int:
    """Run `python script/merge_lora.py *words` in this process; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["merge_lora.py", *map(str, words)])
        patch.setattr(sys, "path", list(sys.path))
        try:
            runpy.run_path(str(ROOT / "script" / "merge_lora.py"), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


def make_base(folder: Path, llama_config, tokenizer_source: Path, config_class=LlamaConfig, tied=False, kv_heads=2):
    shape = {
        key: getattr(llama_config, key)
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id")
    }  # fmt: skip
    config = config_class(**shape, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_source).save_pretrained(folder)


def make_adapter(folder: Path, base: Path, tokenizer, *, rope_type="linear", **options):
    """Write an adapter with random changes to all trained weights; returns its model."""
    config = load_config(str(base))
    factor = extend_context(config, EXTENDED, rope_type)
    model = load_base(str(base), config, dtype=torch.float32, load_in_4bit=False, device="cpu")
    model = add_adapter(model, rank=4, alpha=16, dropout=0.0, **options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    for parameter in trained:
        parameter.data += 0.1 * torch.randn_like(parameter)
    write_adapter(folder, model, tokenizer, config)
    write_record(folder, {"base_model": str(base), "rope_type": rope_type, "rope_factor": factor, "steps": 7})
    return model.eval()


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


class Case:
    """Folders of a base, an adapter and the merged model, and the logits of base and adapter."""

    def __init__(self, folder: Path):
        self.base, self.adapter, self.merged = folder / "base", folder / "run", folder / "run-merged"
        self.expected: list[torch.Tensor] = []
        self.of_base: list[torch.Tensor] = []


@pytest.fixture(scope="module")
def ids(llama_config) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randint(llama_config.vocab_size, (2, length)) for length in LENGTHS]


@pytest.fixture(scope="module")
def cases(tmp_path_factory, llama_config, base_folder, ids) -> dict[str, Case]:
    """All adapters, merged in fp32."""
    made = {}
    for name, options in CASES.items():
        torch.manual_seed(1)
        case = Case(tmp_path_factory.mktemp(name))
        of_base = {key: options[key] for key in ("config_class", "tied", "kv_heads") if key in options}
        of_adapter = {key: value for key, value in options.items() if key not in of_base}
        make_base(case.base, llama_config, base_folder, **of_base)
        model = make_adapter(case.adapter, case.base, AutoTokenizer.from_pretrained(case.base), **of_adapter)
        case.expected = [logits(model, rows) for rows in ids]
        plain = AutoModelForCausalLM.from_pretrained(
            case.base, config=AutoConfig.from_pretrained(case.adapter), dtype=torch.float32
        ).eval()
        case.of_base = [logits(plain, rows) for rows in ids]
        assert merge("--adapter_name_or_path", case.adapter, "--dtype", "float32") == 0
        made[name] = case
    return made


@pytest.mark.parametrize("name", CASES)
def test_merged_equals_the_adapter_and_not_the_base(cases, ids, name):
    case = cases[name]
    merged = AutoModelForCausalLM.from_pretrained(case.merged, dtype=torch.float32).eval()
    for rows, expected, of_base in zip(ids, case.expected, case.of_base, strict=True):
        found = logits(merged, rows)
        assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
        assert (found - of_base).abs().mean() > 0.05


STOCK = """
import importlib.util, sys, torch
assert importlib.util.find_spec("component") is None
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, names = torch.load("ids.pt"), sys.argv[1:]
out = {}
for name in names:
    model, report = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), (name, report)
    assert model.config._attn_implementation == "sdpa", name
    assert len(AutoTokenizer.from_pretrained(name)("A feather.").input_ids) > 2, name
    with torch.no_grad():
        out[name] = [model.eval()(input_ids=rows).logits for rows in ids]
    generated = model.generate(ids[0][:1], max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > ids[0].shape[1]
torch.save(out, "logits.pt")
"""


def test_merged_models_load_in_stock_transformers(cases, ids, tmp_path):
    """Without this project on the path: the adapter's logits at the extended length."""
    torch.save(ids, tmp_path / "ids.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    folders = {str(case.merged): case for case in cases.values()}
    run = subprocess.run(
        [sys.executable, "-c", STOCK, *folders],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = torch.load(tmp_path / "logits.pt")
    for folder, case in folders.items():
        for theirs, expected, of_base in zip(found[folder], case.expected, case.of_base, strict=True):
            assert_close(theirs, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
            assert (theirs - of_base).abs().mean() > 0.05


@pytest.mark.parametrize("name", CASES)
def test_exact_files(cases, name):
    merged = cases[name].merged
    assert {file.name for file in merged.iterdir()} == FILES
    weights, base = load_file(merged / "model.safetensors"), load_file(cases[name].base / "model.safetensors")
    assert {key: value.shape for key, value in weights.items()} == {key: value.shape for key, value in base.items()}
    assert ("lm_head.weight" in weights) == ("tied" not in name)


@pytest.mark.parametrize("name", CASES)
def test_config_is_the_extended_one(cases, name):
    merged, extended = (
        json.loads((folder / "config.json").read_text()) for folder in (cases[name].merged, cases[name].adapter)
    )
    scaling = {key: value for key, value in extended["rope_parameters"].items() if key != "rope_theta"}
    assert merged.pop("rope_scaling") == scaling  # read by transformers 4
    assert merged.pop("rope_theta") == extended["rope_parameters"]["rope_theta"]
    if name == "yarn":
        assert merged.pop("max_position_embeddings") == 4 * extended.pop("max_position_embeddings")
    assert merged == extended
    assert merged["rope_parameters"]["factor"] == 4.0
    assert merged["use_cache"]
    assert not {"group_size", "quantization_config", "_attn_implementation"} & merged.keys()


def test_the_record_names_base_and_adapter(cases):
    case = cases["lora"]
    record = json.loads((case.merged / "longqlora.json").read_text())
    assert record["base_model"] == str(case.base)
    assert record["rope_factor"] == 4.0
    assert record["merged_from"] == str(case.adapter)
    weights = (case.adapter / "adapter_model.safetensors").read_bytes()
    assert record["merged_sha256"] == hashlib.sha256(weights).hexdigest()
    assert record["files"].keys() == FILES - {"longqlora.json", "README.md"}


def test_k22_an_adapter_is_not_merged_twice(cases, tmp_path, capsys):
    moved = shutil.copytree(cases["lora"].adapter, tmp_path / "moved")
    words = ["--model_name_or_path", cases["lora"].merged, "--adapter_name_or_path", moved]
    assert merge(*words, "--save_path", tmp_path / "twice") == 1
    assert f"was merged from {moved}, so the adapter would be added twice" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_the_tokenizer_is_the_adapters(cases):
    case = cases["lora"]
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (case.merged, case.adapter))
    assert ours.get_vocab() == theirs.get_vocab()
    assert json.loads((case.merged / "tokenizer.json").read_text())["truncation"] is None
    assert ours("«Größe», 東京").input_ids == theirs("«Größe», 東京").input_ids


@pytest.mark.parametrize("name", ["all", "tied-all", "biases"])
@pytest.mark.parametrize(("dtype", "digits"), [("float16", 2**-9), ("bfloat16", 2**-6), (None, 2**-9)])
def test_half_precision(cases, ids, tmp_path, name, dtype, digits):
    """Within rounding of the fp32 merge; fp16 by default."""
    case = cases[name]
    flags = [] if dtype is None else ["--dtype", dtype]
    assert merge("--adapter_name_or_path", case.adapter, "--save_path", tmp_path / "half", *flags) == 0
    half, exact = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", case.merged))
    assert half.keys() == exact.keys()
    for key, value in half.items():
        assert value.dtype == getattr(torch, dtype or "float16")
        # base, A, B and the sum are each rounded
        assert_close(value.float(), exact[key], atol=digits * float(exact[key].abs().max()), rtol=digits)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == (dtype or "float16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    for rows, expected, of_base in zip(ids, case.expected, case.of_base, strict=True):
        off = (logits(model, rows) - expected).abs().mean()
        assert off < 0.02 * (expected - of_base).abs().mean() * (digits * 2**9)


# ---- input and output folders


@pytest.fixture
def run(cases, tmp_path) -> Path:
    """A finished run in its own output folder."""
    return Path(shutil.copytree(cases["all"].adapter, tmp_path / "output" / "run"))


def test_default_names(run, capsys):
    assert merge("--adapter_name_or_path", run) == 0
    assert {file.name for file in (run.parent / "run-merged").iterdir()} == FILES
    assert {file.name for file in run.parent.iterdir()} == {"run", "run-merged"}
    printed = capsys.readouterr()
    assert str(run) in printed.err
    assert str(run.parent / "run-merged") in printed.out


def test_the_newest_finished_run_is_merged(run, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint.newest_run, "__defaults__", (run.parent,))
    shutil.copytree(run, run.parent / "older")
    os.utime(run.parent / "older" / "longqlora.json", (1e9, 1e9))
    shutil.copytree(run, run.parent / "killed" / "checkpoint-2")
    assert merge("--dtype", "float32") == 0
    assert {file.name for file in run.parent.iterdir()} == {"run", "run-merged", "older", "killed"}
    assert str(run) in capsys.readouterr().err


def test_without_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint.newest_run, "__defaults__", (tmp_path / "output",))
    assert merge() == 1
    message = capsys.readouterr().err
    assert "--adapter_name_or_path" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_an_existing_target_is_refused(run, tmp_path, capsys, kind):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "precious").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert merge("--adapter_name_or_path", run, "--save_path", target) == 1
    assert f"--save_path: {target} exists" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("what", ["weights cut", "no base", "longer context", "no adapter"])
def test_mistakes_leave_nothing_behind(run, capsys, what):
    flags = ["--adapter_name_or_path", run]
    if what == "weights cut":
        os.truncate(run / "adapter_model.safetensors", 5000)
        fragment = "adapter_model.safetensors"
    elif what == "no base":
        flags += ["--model_name_or_path", "/nowhere/base"]
        fragment = "/nowhere/base"
    elif what == "longer context":
        flags += ["--context_size", EXTENDED + 1]
        fragment = "context_size"
    else:
        flags = ["--adapter_name_or_path", run.parent / "nowhere"]
        fragment = "nowhere"
    before = sorted(run.parent.rglob("*"))
    assert merge(*flags) == 1
    message = capsys.readouterr().err
    assert fragment in message.splitlines()[-1]
    assert "Traceback" not in message
    assert sorted(run.parent.rglob("*")) == before


def test_a_full_disk_leaves_nothing_behind(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(OSError, match="disk full"):
        merge("--adapter_name_or_path", run)
    assert [file.name for file in run.parent.iterdir()] == ["run"]


def test_a_moved_base(run, cases, tmp_path):
    moved = shutil.copytree(cases["all"].base, tmp_path / "moved")
    record = json.loads((run / "longqlora.json").read_text())
    (run / "longqlora.json").write_text(json.dumps({**record, "base_model": "/gone"}))
    assert merge("--adapter_name_or_path", run) == 1
    assert merge("--adapter_name_or_path", run, "--model_name_or_path", moved, "--dtype", "float32") == 0
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (run.parent / "run-merged", cases["all"].merged)
    )
    for key, value in theirs.items():
        assert_close(ours[key], value, atol=0, rtol=0)


def test_another_projects_adapter(run, cases, tmp_path, capsys):
    """Only PEFT's two files: they name the base, but the context must be given, as in the original's merge."""
    for file in run.iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    base = cases["all"].base
    assert merge("--adapter_name_or_path", run, "--save_path", tmp_path / "short", "--check", "no") == 0
    assert f"{base}, as {run}'s adapter_config.json says" in capsys.readouterr().err
    assert AutoConfig.from_pretrained(tmp_path / "short").rope_parameters["rope_type"] == "default"
    flags = ["--adapter_name_or_path", run, "--model_name_or_path", base, "--context_size", EXTENDED]
    assert merge(*flags, "--dtype", "float32") == 0
    merged = run.parent / "run-merged"
    assert {file.name for file in merged.iterdir()} == FILES
    assert AutoConfig.from_pretrained(merged).rope_parameters["factor"] == 4.0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (merged, cases["all"].merged))
    for key, value in theirs.items():
        assert_close(ours[key], value, atol=0, rtol=0)


def test_a_checkpoint_can_be_merged(run, cases, tmp_path):
    """Every complete checkpoint-N is an adapter folder."""
    folder = shutil.copytree(run, tmp_path / "other" / "checkpoint-2")
    assert merge("--adapter_name_or_path", folder, "--dtype", "float32") == 0
    ours = load_file(tmp_path / "other" / "checkpoint-2-merged" / "model.safetensors")
    theirs = load_file(cases["all"].merged / "model.safetensors")
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_the_command_in_its_own_folder(run, cases):
    """`cd script && python merge_lora.py`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "merge_lora.py", "--adapter_name_or_path", str(run), "--dtype", "float32"]
    done = subprocess.run(command, cwd=ROOT / "script", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = load_file(run.parent / "run-merged" / "model.safetensors")
    theirs = load_file(cases["all"].merged / "model.safetensors")
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


# ---- killed at any moment


def killed_merge(seconds: float, begun: Path | None, *words: object) -> int:
    """Merge in a forked process that gets SIGKILL after `seconds`, counted from when `begun` exists; its exit status.

    Forked, since a new Python process would take a hundred times as long to import libraries as to merge.
    """
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.dup2(2, 1)
        tqdm.set_lock(threading.RLock())  # the shared default lock would stay held after a kill
        os._exit(merge(*words))
    deadline = time.monotonic() + 10
    while begun and not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forked with threads: the child starts none
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment(run, overwrite, monkeypatch):
    """The target is complete or absent, and the next merge removes what a killed one leaves."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    target, writing = run.parent / "run-merged", run.parent / ".run-merged.writing"
    words = ["--adapter_name_or_path", run, "--check", "no", "--max_shard_size", "4KB", "--overwrite"]
    assert merge(*words) == 0
    expected = {file.name: file.read_bytes() for file in target.iterdir()}
    assert len(expected) > 15
    begin = time.monotonic()
    assert merge(*words) == 0
    duration = time.monotonic() - begin
    states, moments = [], random.Random(0)
    in_the_middle = (-signal.SIGKILL, overwrite, True)  # of writing
    for moment in range(40):  # more than 10 on a machine that is busy
        if moment >= 10 and in_the_middle in states:
            break
        if not overwrite:
            shutil.rmtree(target, ignore_errors=True)
        share = (moment // 2 % 5 + moments.random()) / 5
        span, begun = (1.3 * duration, None) if moment % 2 else (0.4 * duration, writing)
        shutil.rmtree(writing, ignore_errors=True)
        status = killed_merge(share * span, begun, *words)
        assert status in (0, -signal.SIGKILL)
        states.append((status, target.exists(), writing.exists()))
        if overwrite or target.exists():
            assert {file.name: file.read_bytes() for file in target.iterdir()} == expected
    assert in_the_middle in states
    writing.mkdir(exist_ok=True)
    (writing / "half").write_text("")
    assert merge(*words) == 0
    assert {file.name for file in run.parent.iterdir()} == {"run", "run-merged"}
    assert {file.name: file.read_bytes() for file in target.iterdir()} == expected


# ---- overwriting


def test_a_model_is_overwritten_when_asked(run, cases):
    assert merge("--adapter_name_or_path", run) == 0
    target = run.parent / "run-merged"
    assert merge("--adapter_name_or_path", run, "--dtype", "float32", "--overwrite") == 0
    assert {file.name for file in target.iterdir()} == FILES
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (target, cases["all"].merged))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_a_model_is_overwritten_through_a_link(run, capsys):
    """The link stays, and the program tells where it leads."""
    words = ["--adapter_name_or_path", run, "--check", "no"]
    assert merge(*words) == 0
    target, link = run.parent / "run-merged", run.parent / "link"
    link.symlink_to(target)
    (target / "longqlora.json").write_text((target / "longqlora.json").read_text() + " ")
    assert merge(*words, "--save_path", link, "--overwrite") == 0
    assert f"into {link}, a link to {target}" in capsys.readouterr().err
    assert link.readlink() == target
    assert not (target / "longqlora.json").read_text().endswith(" ")
    assert {file.name for file in target.iterdir()} == FILES
    assert {file.name for file in run.parent.iterdir()} == {"run", "run-merged", "link"}


def test_k7_only_what_a_merge_wrote_is_replaced(run, tmp_path, capsys):
    """Another adapter with its checkpoints is no merged model, nor is a merged model into which a user put a file."""
    other = shutil.copytree(run, tmp_path / "other")
    (other / "checkpoint-1").mkdir()
    (other / "checkpoint-1" / "optimizer.pt").write_text("of days")
    assert merge("--adapter_name_or_path", run, "--save_path", other, "--overwrite") == 1
    assert f"--save_path: {other} was not written by a merge" in capsys.readouterr().err
    assert (other / "checkpoint-1" / "optimizer.pt").read_text() == "of days"

    merged = tmp_path / "merged"
    words = ["--adapter_name_or_path", run, "--save_path", merged, "--check", "no"]
    assert merge(*words) == 0
    for name in ("model.gguf", ".git/HEAD"):
        (merged / name).parent.mkdir(exist_ok=True)
        (merged / name).write_text("mine")
        assert merge(*words, "--overwrite") == 1
        assert f"1 files that no merge wrote, such as {name}" in capsys.readouterr().err
        assert (merged / name).read_text() == "mine"
        (merged / name).unlink()
    assert merge(*words, "--overwrite") == 0


def test_k7_a_merge_of_another_projects_adapter_may_be_replaced(run, tmp_path, cases):
    """It has no record, but what was merged from it has one."""
    foreign = shutil.copytree(run, tmp_path / "foreign")
    (foreign / "longqlora.json").unlink()
    words = ["--adapter_name_or_path", foreign, "--model_name_or_path", cases["all"].base, "--check", "no"]
    assert merge(*words) == 0
    assert merge(*words) == 1
    assert merge(*words, "--overwrite") == 0
    record = json.loads((tmp_path / "foreign-merged" / "longqlora.json").read_text())
    assert record["merged_from"] == str(foreign)
    assert (record["base_model"], record["rope_type"], record["rope_factor"]) == (str(cases["all"].base), "default", 1)


@pytest.mark.parametrize("what", ["notes", "adapter", "base", "above"])
def test_what_is_never_overwritten(run, cases, tmp_path, capsys, what):
    if what == "notes":
        (tmp_path / "notes").mkdir()
    elif what == "above":
        (tmp_path / "output" / "config.json").write_text("{}")
    folders = {"notes": tmp_path / "notes", "adapter": run, "base": cases["all"].base, "above": tmp_path / "output"}
    before = sorted(tmp_path.rglob("*"))
    assert merge("--adapter_name_or_path", run, "--save_path", folders[what], "--overwrite") == 1
    assert str(folders[what]) in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert (cases["all"].base / "model.safetensors").exists()


# ---- compared with the adapter


def test_it_is_checked_by_default(run, capsys):
    assert merge("--adapter_name_or_path", run) == 0
    printed = capsys.readouterr().out
    for first, last in ((0, 63), (EXTENDED - 64, EXTENDED - 1)):
        assert f"positions {first} to {last}: logits differ by" in printed
    assert merge("--adapter_name_or_path", run, "--check", "only") == 0
    assert "positions 192 to 255: logits differ by" in capsys.readouterr().out


def no_norms(name, weight, base):
    return base if "norm" in name else weight


def no_embeddings(name, weight, base):
    return base if "embed" in name else weight


def no_last_layer(name, weight, base):
    return base if name.startswith("model.layers.1.mlp.down_proj") else weight


def twice_the_adapter(name, weight, base):
    return (2 * weight.float() - base.float()).to(weight.dtype)


def transposed(name, weight, base):
    return weight.t().contiguous() if name.endswith("o_proj.weight") else weight


@pytest.mark.parametrize("mutation", [no_norms, no_embeddings, no_last_layer, twice_the_adapter, transposed])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_wrong_merge_is_refused(run, monkeypatch, capsys, mutation, dtype):
    """Each mutation drops or distorts something; no model is left behind."""
    right = merging.merged_tensor

    def wrong(plan, name, scratch):
        base = plan.tensors[name].read().to(plan.dtype)
        return mutation(name, right(plan, name, scratch).clone(), base)

    monkeypatch.setattr(merging, "merged_tensor", wrong)
    assert merge("--adapter_name_or_path", run, "--dtype", dtype) == 1
    assert "--check: " in capsys.readouterr().err
    assert [file.name for file in run.parent.iterdir()] == ["run"]


def test_no_model_to_check(run, capsys):
    assert merge("--adapter_name_or_path", run, "--check", "only") == 1
    assert "--save_path" in capsys.readouterr().err


# ---- merged into dequantized weights, and perplexities


@pytest.fixture(scope="module")
def wide(tmp_path_factory, llama_config, base_folder) -> Path:
    """An adapter on a base whose rows are one NF4 block wide."""
    folder = tmp_path_factory.mktemp("wide")
    shape = copy.deepcopy(llama_config)
    shape.hidden_size, shape.intermediate_size = 64, 128
    torch.manual_seed(2)
    make_base(folder / "base", shape, base_folder)
    make_adapter(folder / "run", folder / "base", AutoTokenizer.from_pretrained(base_folder), **NORMS)
    return folder / "run"


def test_nf4_is_the_adapter_on_4_bit_weights(wide, tmp_path, capsys):
    words = ["--adapter_name_or_path", wide, "--dtype", "float32"]
    assert merge(*words, "--save_path", tmp_path / "nf4", "--base", "nf4") == 0
    assert "positions 192 to 255: logits differ by" in capsys.readouterr().out
    assert json.loads((tmp_path / "nf4" / "longqlora.json").read_text())["base_weights"] == "nf4"
    assert merge(*words, "--save_path", tmp_path / "nf4", "--check", "only") == 1  # against 16-bit weights
    assert "--check: " in capsys.readouterr().err


def test_perplexities_of_both_merges(wide, tmp_path, capsys):
    torch.randint(384, (600,)).numpy().astype("uint16").tofile(tmp_path / "tokens.bin")
    words = ["--adapter_name_or_path", wide, "--save_path", tmp_path / "merged", "--dtype", "float32"]
    assert merge(*words, "--measure", tmp_path / "tokens.bin", "--seq_len", 128) == 0
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"((?:adapter on|merged into) (?:fp16|nf4)) +([0-9.]+)", printed))
    assert rows.keys() == {"adapter on fp16", "adapter on nf4", "merged into fp16", "merged into nf4"}
    assert float(rows["adapter on fp16"]) == pytest.approx(float(rows["merged into fp16"]), rel=1e-4)
    assert float(rows["adapter on nf4"]) == pytest.approx(float(rows["merged into nf4"]), rel=1e-4)
    assert float(rows["adapter on nf4"]) != pytest.approx(float(rows["adapter on fp16"]), rel=1e-3)
    expected = measure_perplexity(
        load_model(None, str(wide), dtype=torch.float32),
        read_tokens(str(tmp_path / "tokens.bin"), 384), seq_len=128, stride=128,
    )  # fmt: skip
    assert float(rows["adapter on fp16"]) == pytest.approx(expected.perplexity, abs=1e-3)
    assert {file.name for file in (tmp_path / "merged").iterdir()} == FILES


def test_perplexities_over_tokens_on_the_hub(wide, tmp_path, monkeypatch, capsys):
    torch.ones(300).numpy().astype("uint16").tofile(tmp_path / "tokens.bin")

    def download(repository: str, name: str, repo_type: str) -> str:
        assert (repository, repo_type) == ("owner/data", "dataset")
        return str(tmp_path / name)

    monkeypatch.setattr("component.evaluate.model_spec.hf_hub_download", download)
    words = ["--adapter_name_or_path", wide, "--save_path", tmp_path / "merged", "--check", "no"]
    assert merge(*words, "--measure", "owner/data/tokens.bin", "--seq_len", 128) == 0
    assert "merged into nf4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"),
    [(["--measure", "nowhere.bin"], "--measure: there is no file nowhere"), (["--measure", "few.bin"], "--measure"),
     (["--measure", "few.bin", "--seq_len", "1"], "seq_len"), (["--max_shard_size", "huge"], "--max_shard_size")],
)  # fmt: skip
def test_flags_are_refused_before_anything_is_merged(wide, tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    torch.ones(100).numpy().astype("uint16").tofile("few.bin")
    assert merge("--adapter_name_or_path", wide, "--save_path", tmp_path / "merged", *words) == 1
    assert part in capsys.readouterr().err.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == ["few.bin"]


def test_an_earlier_merge_is_renewed(cases, tmp_path, run_program):
    """--check only tells what other engines read wrongly; --renew_config cures it, and leaves the weights alone."""
    old = shutil.copytree(cases["yarn"].merged, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    config["max_position_embeddings"] //= 4
    del config["rope_theta"], config["rope_scaling"]
    (old / "config.json").write_text(json.dumps(config))
    write_record(old, json.loads((old / "longqlora.json").read_text()))
    weights = (old / "model.safetensors").read_bytes()
    words = ["--adapter_name_or_path", cases["yarn"].adapter, "--save_path", old]
    outcome = run_program("script/merge_lora.py", *words, "--check", "only")
    assert outcome.status == 0, outcome.err
    assert "in other engines: max_position_embeddings is" in outcome.err
    assert f"--save_path {old} --renew_config" in outcome.err
    assert run_program("script/merge_lora.py", "--save_path", old, "--renew_config").status == 0
    assert (old / "config.json").read_text() == (cases["yarn"].merged / "config.json").read_text()
    assert (old / "model.safetensors").read_bytes() == weights
    again = run_program("script/merge_lora.py", *words, "--check", "only")
    assert again.status == 0, again.err  # its record has the new sizes
    assert "in other engines" not in again.err
