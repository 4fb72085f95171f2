"""Content of adapter folders, complete and incomplete checkpoints, and which run may write where."""

import json
import os
import re
import shutil
import stat
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from component import checkpoint
from component.adapter import add_adapter
from component.checkpoint import (
    checkpoint_to_resume,
    checkpoints,
    latest_complete_checkpoint,
    merged_folder,
    newest_run,
    prepare_output_dir,
    read_record,
    remove_old_checkpoints,
    write_adapter,
    write_record,
)
from component.error import UserError
from component.model import load_base, load_config
from component.storage.generated import marked

RECORD = {"base_model": "/models/base", "rope_type": "linear", "rope_factor": 2.0}


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- an adapter folder


@pytest.fixture
def model(base_folder):
    base = load_base(
        str(base_folder), load_config(str(base_folder)), dtype=torch.float32, load_in_4bit=False, device="cpu"
    )
    return add_adapter(base, rank=2, alpha=4, dropout=0.0)


def test_exact_files(model, tokenizer, tiny_llama_config, tmp_path):
    expected = [
        "adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert write_adapter(tmp_path / "out", model, tokenizer, tiny_llama_config) == expected
    assert names(tmp_path / "out") == set(expected)
    assert {mode(file) for file in (tmp_path / "out").iterdir()} == {mode(tmp_path / "out" / "config.json")}
    write_record(tmp_path / "out", RECORD)
    assert names(tmp_path / "out") == {*expected, "longqlora.json"}
    record = json.loads((tmp_path / "out" / "longqlora.json").read_text())
    assert record["files"] == {name: (tmp_path / "out" / name).stat().st_size for name in expected}


def test_truncation_of_the_last_call_is_not_saved(model, tokenizer, tiny_llama_config, tmp_path):
    """Programs that read tokenizer.json would truncate every prompt like a training sample."""
    tokenizer("A text of more than three tokens.", truncation=True, max_length=3)
    assert tokenizer.backend_tokenizer.truncation is not None
    write_adapter(tmp_path, model, tokenizer, tiny_llama_config)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None
    assert len(AutoTokenizer.from_pretrained(tmp_path)("A text of more than three tokens.").input_ids) > 3


def test_the_hub_is_not_contacted(model, tokenizer, tiny_llama_config, tmp_path):
    """PEFT's `save_embedding_layers="auto"` looks up the base's config online; here the base does not exist."""
    model.peft_config["default"].base_model_name_or_path = "nobody/no-such-model"
    model.get_base_model().config._name_or_path = "nobody/no-such-model"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*config file")  # PEFT's, if the lookup fails
        write_adapter(tmp_path, model, tokenizer, tiny_llama_config)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_an_interrupted_write_keeps_the_old_files(model, tokenizer, tiny_llama_config, tmp_path, monkeypatch):
    write_adapter(tmp_path, model, tokenizer, tiny_llama_config)
    write_record(tmp_path, RECORD)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(
        type(tokenizer), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    for parameter in model.parameters():
        parameter.data += 1
    with pytest.raises(OSError, match="disk full"):
        write_adapter(tmp_path, model, tokenizer, tiny_llama_config)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_folder_being_rewritten_is_incomplete(model, tokenizer, tiny_llama_config, tmp_path):
    """Otherwise new weights with an old record would pass as complete: the sizes are the same."""
    write_adapter(tmp_path, model, tokenizer, tiny_llama_config)
    write_record(tmp_path, RECORD)
    (tmp_path / ".writing-abc").mkdir()  # of a killed process
    write_adapter(tmp_path, model, tokenizer, tiny_llama_config)
    assert read_record(tmp_path) is None
    assert not (tmp_path / ".writing-abc").exists()


def test_the_config_loads(model, tokenizer, tiny_llama_config, tmp_path):
    write_adapter(tmp_path, model, tokenizer, tiny_llama_config)
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["hidden_size"] == 32


# ---- the record


def make_checkpoint(folder: Path, **record) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"w" * 1000)
    (folder / "global_step2").mkdir()
    (folder / "global_step2" / "optim_states.pt").write_bytes(b"o" * 500)
    write_record(folder, {**RECORD, **record})
    return folder


def test_record_comes_back(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint-2", steps=2, trained_tokens=1234)
    record = read_record(folder)
    assert record.items() >= {**RECORD, "steps": 2, "trained_tokens": 1234}.items()
    assert record["files"] == {
        "adapter_config.json": 2, "adapter_model.safetensors": 1000, "global_step2/optim_states.pt": 500,
    }  # fmt: skip


def test_the_card_may_be_edited(tmp_path):
    """Its size is in no record, or the folder would count as incomplete; nor does PEFT's empty one come into it."""
    folder = make_checkpoint(tmp_path / "checkpoint-2")
    (folder / "README.md").write_text("Mine.")
    write_record(folder, RECORD)
    assert "README.md" not in read_record(folder)["files"]
    (folder / "README.md").write_text("Mine, changed.")
    assert read_record(folder) is not None


def test_a_folder_without_a_record(tmp_path):
    assert read_record(tmp_path) is None
    assert read_record(str(tmp_path / "nowhere")) is None


def test_records_are_written_atomically(tmp_path, monkeypatch):
    """The old record stays until the new one is complete on disk."""
    folder = make_checkpoint(tmp_path / "run")
    before = (folder / "longqlora.json").read_bytes()

    def full(self, text, **options):
        with self.open("w") as stream:
            stream.write(text[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        write_record(folder, {**RECORD, "steps": 9})
    assert (folder / "longqlora.json").read_bytes() == before


CUTS = {
    "adapter_model.safetensors": lambda folder: os.truncate(folder / "adapter_model.safetensors", 999),
    "global_step2/optim_states.pt": lambda folder: (folder / "global_step2" / "optim_states.pt").unlink(),
    "adapter_config.json": lambda folder: (folder / "adapter_config.json").unlink(),
}
BROKEN_RECORDS = ["", "{", "[]", "null", '{"files": {}}', '{"files": 3}', json.dumps({**RECORD, "files": ["a"]})]


@pytest.mark.parametrize("name", CUTS)
def test_truncated_and_missing_files_are_named(tmp_path, name):
    folder = make_checkpoint(tmp_path / "checkpoint-2")
    CUTS[name](folder)
    with pytest.raises(UserError) as error:
        read_record(folder)
    assert name in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("text", BROKEN_RECORDS)
def test_a_broken_record_is_named(tmp_path, text):
    folder = make_checkpoint(tmp_path / "checkpoint-2")
    (folder / "longqlora.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(folder / "longqlora.json"))):
        read_record(folder)


def test_a_record_covers_only_the_named_files(tmp_path):
    """A log in output_dir may grow after the record is written."""
    folder = make_checkpoint(tmp_path / "run")
    (folder / "train.txt").write_text("step 1\n")
    make_checkpoint(folder / "checkpoint-2")
    write_record(folder, RECORD, names=["adapter_config.json", "adapter_model.safetensors"])
    (folder / "train.txt").write_text("step 1\nstep 2\n")
    shutil.rmtree(folder / "checkpoint-2")
    assert read_record(folder)["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}


# ---- checkpoints of a run


@pytest.fixture
def run(tmp_path) -> Path:
    """Checkpoints at steps 9, 10 and 100, whose names do not sort by step, and other folders."""
    for step in (100, 9, 10):
        make_checkpoint(tmp_path / "run" / f"checkpoint-{step}", steps=step)
    (tmp_path / "run" / "checkpoint-final").mkdir()
    (tmp_path / "run" / "tmp-checkpoint-200").mkdir()
    return tmp_path / "run"


def test_checkpoints_by_step(run, tmp_path):
    assert [folder.name for folder in checkpoints(run)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert checkpoints(tmp_path / "nowhere") == []


def cut_record(folder: Path) -> None:
    (folder / "longqlora.json").unlink()


def break_record(folder: Path) -> None:
    os.truncate(folder / "longqlora.json", 20)


@pytest.mark.parametrize("cut", [*CUTS.values(), cut_record, break_record])
def test_latest_complete_checkpoint_skips_incomplete_ones(run, cut):
    assert latest_complete_checkpoint(run).name == "checkpoint-100"
    cut(run / "checkpoint-100")
    assert latest_complete_checkpoint(run).name == "checkpoint-10"
    cut(run / "checkpoint-10")
    assert latest_complete_checkpoint(run).name == "checkpoint-9"
    cut(run / "checkpoint-9")
    assert latest_complete_checkpoint(run) is None


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, "checkpoint-100", {9, 10, 100}),
        (0, "checkpoint-100", {9, 10, 100}),
        (-1, "checkpoint-100", {9, 10, 100}),
        (5, "checkpoint-100", {9, 10, 100}),
        (2, "checkpoint-100", {10, 100}),
        (1, "checkpoint-100", {100}),
        (1, "checkpoint-10", {10}),
        (2, "checkpoint-9", {9, 100}),
    ],
)
def test_old_checkpoints_are_removed(run, limit, keep, left):
    remove_old_checkpoints(run, limit, keep=[run / keep])
    assert {int(folder.name.split("-")[1]) for folder in checkpoints(run)} == left
    assert (run / "checkpoint-final").is_dir()


def test_the_best_checkpoint_is_kept(run, monkeypatch):
    monkeypatch.chdir(run.parent)  # a relative output_dir beside an absolute best_model_checkpoint
    remove_old_checkpoints("run", 1, keep=[Path("run/checkpoint-100"), run / "checkpoint-9"])
    assert [folder.name for folder in checkpoints(run)] == ["checkpoint-9", "checkpoint-100"]


# ---- resuming and overwriting


@pytest.mark.parametrize("value", [None, False, "false", "False", "none", ""])
def test_not_resuming(run, value):
    assert checkpoint_to_resume(str(run), value) is None


@pytest.mark.parametrize("value", [True, "true", "True", "auto", "AUTO"])
def test_resuming_from_the_latest_complete_one(run, value):
    assert Path(checkpoint_to_resume(str(run), value)) == run / "checkpoint-100"
    cut_record(run / "checkpoint-100")
    assert Path(checkpoint_to_resume(str(run), value)) == run / "checkpoint-10"


def test_resuming_from_nothing(tmp_path):
    assert checkpoint_to_resume(str(tmp_path / "new"), "auto") is None
    with pytest.raises(UserError, match=r"resume_from_checkpoint: true.*auto"):
        checkpoint_to_resume(str(tmp_path / "new"), "true")


def test_resuming_from_a_path(run, tmp_path):
    path = str(run / "checkpoint-10")
    assert checkpoint_to_resume(str(tmp_path / "elsewhere"), path) == path
    with pytest.raises(UserError, match=r"resume_from_checkpoint: .*nowhere.*auto"):
        checkpoint_to_resume(str(run), str(tmp_path / "nowhere"))
    cut_record(run / "checkpoint-10")
    with pytest.raises(UserError, match=r"resume_from_checkpoint: .*checkpoint-10.*auto"):
        checkpoint_to_resume(str(run), path)


@pytest.mark.parametrize("resume", [None, "auto", False])
def test_a_new_folder(tmp_path, resume):
    assert prepare_output_dir(str(tmp_path / "new"), resume, overwrite=False) is None
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "train.log").write_text("")
    assert prepare_output_dir(str(tmp_path / "new"), resume, overwrite=False) is None


def test_a_file_as_output_dir(tmp_path):
    (tmp_path / "file").write_text("")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"output_dir: .*file"):
            prepare_output_dir(str(tmp_path / "file"), None, overwrite)


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_folder_with_a_run_needs_a_decision(run, is_finished):
    if is_finished:
        (run / "adapter_config.json").write_text("{}")
    before = names(run)
    with pytest.raises(UserError) as error:
        prepare_output_dir(str(run), None, overwrite=False)
    for fragment in ("output_dir", str(run), "resume_from_checkpoint", "overwrite_output_dir"):
        assert fragment in str(error.value)
    assert Path(prepare_output_dir(str(run), "auto", overwrite=False)) == run / "checkpoint-100"
    assert names(run) == before


def test_a_run_killed_before_its_first_checkpoint_restarts(run):
    for folder in checkpoints(run):
        cut_record(folder)
    assert prepare_output_dir(str(run), "auto", overwrite=False) is None
    with pytest.raises(UserError, match="output_dir"):
        prepare_output_dir(str(run), None, overwrite=False)


def test_a_finished_run_without_checkpoints_is_not_overwritten(tmp_path):
    make_checkpoint(tmp_path / "run")
    with pytest.raises(UserError, match="output_dir"):
        prepare_output_dir(str(tmp_path / "run"), "auto", overwrite=False)


def finished(run: Path) -> Path:
    for name in ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "longqlora.json",
                 "all_results.json", "eval_results.json", "train.log"):  # fmt: skip
        (run / name).write_text("{}")
    return run


@pytest.mark.parametrize("resume", [None, "auto"])
def test_overwriting_deletes_only_the_old_run(run, resume):
    (run / "README.md").write_text(marked("# The old run"))
    assert prepare_output_dir(str(finished(run)), resume, overwrite=True) is None
    assert names(run) == {"checkpoint-final", "tmp-checkpoint-200", "train.log"}
    with pytest.raises(UserError, match="no finished run"):
        newest_run(run.parent)


def test_overwriting_keeps_a_card_that_a_user_changed(run):
    changed = marked("# The old run") + "Mine.\n"
    (finished(run) / "README.md").write_text(changed)
    assert prepare_output_dir(str(run), None, overwrite=True) is None
    assert (run / "README.md").read_text() == changed


def test_only_the_first_process_overwrites(run, monkeypatch):
    """The others may be later than its first new file."""
    before = names(finished(run))
    monkeypatch.setenv("RANK", "1")
    assert prepare_output_dir(str(run), None, overwrite=True) is None
    assert names(run) == before


# ---- the newest finished run


def test_newest_run(tmp_path):
    for age, name in enumerate(("newest", "middle", "oldest")):
        make_checkpoint(tmp_path / name)
        os.utime(tmp_path / name / "longqlora.json", (1e9 - age, 1e9 - age))
    make_checkpoint(tmp_path / "unfinished" / "checkpoint-2")
    (tmp_path / "newest-merged").mkdir()
    write_record(tmp_path / "newest-merged", RECORD)  # a merged model, not an adapter
    assert newest_run(tmp_path) == tmp_path / "newest"
    (tmp_path / "newest" / "longqlora.json").unlink()  # as if killed while saving
    assert newest_run(tmp_path) == tmp_path / "middle"


@pytest.mark.parametrize("make_root", [False, True])
def test_no_run(tmp_path, make_root):
    root = tmp_path / "output"
    if make_root:
        root.mkdir()
    with pytest.raises(UserError, match="adapter_name_or_path") as error:
        newest_run(root)
    assert str(root) in str(error.value)


def test_shipped_files_train_to_the_output_root():
    root = Path(checkpoint.__file__).resolve().parents[1]
    assert root / "output" == checkpoint.OUTPUT_ROOT
    for file in (root / "train_args").glob("*.yaml"):
        assert re.search(r"^output_dir: (\./)?output/", file.read_text(), re.MULTILINE), file


def test_merged_folder():
    assert merged_folder(Path("output/run")) == Path("output/run-merged")


def test_one_run_through_a_link(tmp_path):
    """K6: two names of one folder are one run; both would train into it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with (
        checkpoint.claimed_output_dir(str(tmp_path / "run")),
        pytest.raises(UserError, match="another process is writing"),
        checkpoint.claimed_output_dir(str(tmp_path / "link")),
    ):
        raise AssertionError


def test_a_finished_run_without_checkpoints_is_not_told_to_resume(tmp_path):
    """K21: `auto` is not the cure if it is what was asked for."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="without a complete checkpoint to resume from; set overwrite_output_dir"):
        checkpoint.prepare_output_dir(str(tmp_path), "auto", overwrite=False)
