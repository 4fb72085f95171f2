"""Merging: the merged model is the adapter on its base, and an ordinary model that needs nothing of ours."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from component import checkpoint
from component.adapter import add_adapter
from component.checkpoint import write_adapter, write_record
from component.model import load_base, load_config
from component.rope import extend_context

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "config.json",
    "generation_config.json",
    "longqlora.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
LENGTHS = (20, 250)  # tokens: within the base's 64 positions, and as many as the adapter was made for, nearly
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
    """`python script/merge_lora.py *words`, inside this process; its exit status."""
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
    """An adapter whose weights were moved at random, in `folder`; the model in memory."""
    config = load_config(str(base))
    factor = extend_context(config, EXTENDED, rope_type)
    model = load_base(str(base), config, dtype=torch.float32, load_in_4bit=False, device="cpu")
    model = add_adapter(model, rank=4, alpha=16, dropout=0.0, **options)
    moved = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
            moved += 1
    assert moved
    write_adapter(folder, model, tokenizer, config)
    record = {"base_model": str(base), "rope_type": rope_type, "rope_factor": factor, "steps": 7}
    write_record(folder, record)
    return model.eval()


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


class Case:
    """A base, an adapter for it, what the adapter computes, and where its merged model is."""

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


def test_merged_models_need_nothing_of_ours(cases, ids, tmp_path):
    """Stock transformers, elsewhere, without this project: the adapter's logits at the extended length."""
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
    assert merged == extended
    assert merged["rope_parameters"]["factor"] == 4.0
    assert merged["use_cache"]
    assert not {"group_size", "quantization_config", "_attn_implementation"} & merged.keys()


def test_the_record_says_where_it_comes_from(cases):
    case = cases["lora"]
    record = json.loads((case.merged / "longqlora.json").read_text())
    assert record["base_model"] == str(case.base)
    assert record["rope_factor"] == 4.0
    assert record["merged_from"] == str(case.adapter)
    assert record["files"].keys() == FILES - {"longqlora.json"}


def test_the_tokenizer_is_the_adapters(cases):
    case = cases["lora"]
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (case.merged, case.adapter))
    assert ours.get_vocab() == theirs.get_vocab()
    assert json.loads((case.merged / "tokenizer.json").read_text())["truncation"] is None
    assert ours("«Größe», 東京").input_ids == theirs("«Größe», 東京").input_ids


@pytest.mark.parametrize("name", ["all", "tied-all", "biases"])
@pytest.mark.parametrize(("dtype", "digits"), [("float16", 2**-9), ("bfloat16", 2**-6), (None, 2**-9)])
def test_half_precision(cases, ids, tmp_path, name, dtype, digits):
    """Within rounding of the fp32 merge; fp16 unless told otherwise."""
    case = cases[name]
    flags = [] if dtype is None else ["--dtype", dtype]
    assert merge("--adapter_name_or_path", case.adapter, "--save_path", tmp_path / "half", *flags) == 0
    half, exact = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", case.merged))
    assert half.keys() == exact.keys()
    for key, value in half.items():
        assert value.dtype == getattr(torch, dtype or "float16")
        # base, A and B are rounded, and so is their sum
        assert_close(value.float(), exact[key], atol=digits * float(exact[key].abs().max()), rtol=digits)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == (dtype or "float16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    for rows, expected, of_base in zip(ids, case.expected, case.of_base, strict=True):
        off = (logits(model, rows) - expected).abs().mean()
        assert off < 0.02 * (expected - of_base).abs().mean() * (digits * 2**9)


# ---- where it reads and writes


@pytest.fixture
def run(cases, tmp_path) -> Path:
    """A finished run under an output folder of its own."""
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
    flags, fragment = ["--adapter_name_or_path", run], ""
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


def test_another_projects_adapter(run, cases, tmp_path):
    """PEFT's two files alone: base and context must be named, as the original's merge_lora.py had them in its code."""
    for file in run.iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    assert merge("--adapter_name_or_path", run) == 1
    base = cases["all"].base
    flags = ["--adapter_name_or_path", run, "--model_name_or_path", base, "--context_size", EXTENDED]
    assert merge(*flags, "--dtype", "float32") == 0
    merged = run.parent / "run-merged"
    assert {file.name for file in merged.iterdir()} == FILES - {"longqlora.json"}
    assert AutoConfig.from_pretrained(merged).rope_parameters["factor"] == 4.0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (merged, cases["all"].merged))
    for key, value in theirs.items():
        assert_close(ours[key], value, atol=0, rtol=0)


def test_a_checkpoint_can_be_merged(run, cases, tmp_path):
    """Any whole checkpoint-N is an adapter folder."""
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
