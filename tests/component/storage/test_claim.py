"""May a program write where it is about to? Outputs against inputs, each other, what exists, and other processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from component.error import UserError
from component.storage.claim import check_outputs, claimed, held_result, identity, work_folder
from tests.conftest import ROOT


@pytest.fixture
def files(tmp_path) -> Path:
    for name in ("a.json", "model/config.json", "model/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    os.link(tmp_path / "a.json", tmp_path / "hard.json")
    (tmp_path / "folder-link").symlink_to(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("name", ["a.json", "link.json", "hard.json", "model/../a.json", "./a.json"])
def test_what_is_read_is_never_written(files, name):
    """Not even with --overwrite, and whatever its name."""
    with (
        pytest.raises(UserError, match=r"--output: .* would be overwritten, but --source reads it"),
        claimed({"--output": [files / name]}, {"--source": [files / "a.json"]}, overwrite=True),
    ):
        pass
    assert (files / "a.json").read_text() == "a.json"


@pytest.mark.parametrize("name", ["model/config.json", "folder-link/config.json"])
def test_files_of_a_folder_that_is_read(files, name):
    with (
        pytest.raises(UserError, match="--base_model reads it"),
        claimed({"--output_json": [files / name]}, {"--base_model": [files / "model"]}, overwrite=True),
    ):
        pass


def test_one_output_named_twice(files):
    with (
        pytest.raises(UserError, match=r"--figure: .*new.* is written by --output_json too"),
        claimed({"--output_json": [files / "new"], "--figure": [files / "model/../new"]}, {}),
    ):
        pass


@pytest.mark.parametrize(("overwrite", "told"), [(False, "--overwrite"), (None, "name another file")])
def test_what_exists(files, overwrite, told):
    with (
        pytest.raises(UserError, match=f"exists.*{told}"),
        claimed({"--o": [files / "a.json"]}, {}, overwrite=overwrite),
    ):
        pass
    with claimed({"--o": [files / "a.json", None]}, {}, overwrite=True):
        assert identity(files / "a.json") == identity(files / "hard.json")
    with claimed({"--o": [files / "a.json"]}, {}, overwrite=overwrite, resumed=[files / "link.json"]):
        pass


def test_folders_are_made_and_tried(files):
    with claimed({"--o": [files / "x/y/z.json"]}, {}):
        assert (files / "x/y").is_dir()
    with pytest.raises(UserError, match="is a folder"), claimed({"--o": [files / "model"]}, {}):
        pass
    with pytest.raises(UserError, match=r"--o: .*can't be written"), claimed({"--o": [files / "a.json/b"]}, {}):
        pass


def test_no_lock_is_left(files):
    before = sorted(files.iterdir())
    with claimed({"--o": [files / "new.json"]}, {}):
        assert sorted(files.iterdir()) != before
    assert sorted(files.iterdir()) == before


HOLDER = """
import sys, time
from pathlib import Path
from component.storage.claim import claimed
with claimed({"--output": [Path(sys.argv[1])]}, {}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_and_its_death(files):
    """A killed process blocks nobody: the lock is the operating system's."""
    target = files / "new.json"
    command = [sys.executable, "-c", HOLDER, str(target)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=r"--mine: another process is writing .*new.json"),
            claimed({"--mine": [target]}, {}),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with claimed({"--mine": [target]}, {}):
        target.write_text("mine")
    assert target.read_text() == "mine"


class TestMeasurements:
    MEASURED = '{"versions": {}, "hardware": "H100", "date": "2026-11-25", "rows": []}'

    def test_an_earlier_one_may_be_replaced(self, tmp_path):
        (tmp_path / "r.json").write_text(self.MEASURED)
        for name in ("r.json", "new/r.json"):
            with held_result(tmp_path / name):
                assert (tmp_path / name).parent.is_dir()

    @pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model_type": "llama"}', "{" * 100_000])
    def test_what_others_wrote_is_kept(self, content, tmp_path):
        """K7: --output_json of a measurement over a config.json."""
        (tmp_path / "config.json").write_text(content)
        message = r"--output_json: .*config.json exists; name another file"
        with pytest.raises(UserError, match=message), held_result(tmp_path / "config.json"):
            raise AssertionError("never begun")
        assert (tmp_path / "config.json").read_text() == content

    def test_two_programs(self, tmp_path):
        """K8."""
        file, message = tmp_path / "r.json", "another process is writing"
        with held_result(file), pytest.raises(UserError, match=message), held_result(file):
            raise AssertionError("never begun")


def test_devices_and_pipes_are_not_replaced(tmp_path):
    """K7: what is renamed into place would replace /dev/null, for all programs of the machine."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UserError, match=f"--output: {path} is a device or a pipe"):
            check_outputs([("--output", path)], {}, overwrite=True)


def test_where_no_lock_can_be_made(tmp_path):
    """K14: the message names the output that was asked for, not the lock."""
    target = tmp_path / ("a" * 254)
    told = f"--output: {target} can't be written .File name too long.; name another"
    with pytest.raises(UserError, match=told), claimed({"--output": [target]}, {}):
        raise AssertionError


class TestWorkFolders:
    def test_new_empty_or_its_own(self, tmp_path):
        (tmp_path / "empty").mkdir()
        for name in ("new/er", "empty"):
            for _ in range(2):
                with work_folder(tmp_path / name, "passkey.py", {}):
                    (tmp_path / name / "base").mkdir(exist_ok=True)

    def test_what_others_wrote_is_kept(self, tmp_path):
        """K7: --work over a folder of somebody else, or of another program."""
        with work_folder(tmp_path / "work", "passkey.py", {}):
            (tmp_path / "work" / "base.jsonl").write_text("mine")
        message = r"--work: .*work holds files that examples.py did not write; move them away, or name another folder"
        with pytest.raises(UserError, match=message), work_folder(tmp_path / "work", "examples.py", {}):
            raise AssertionError("never begun")
        assert (tmp_path / "work" / "base.jsonl").read_text() == "mine"

    @pytest.mark.parametrize("inside", [".", "base", "deep/base", "../link/base"])
    def test_inputs_lie_elsewhere(self, inside, tmp_path):
        """K7: the base of an experiment is a folder of its --work, and would be trained over."""
        work = tmp_path / "work"
        with work_folder(work, "passkey.py", {}):
            (work / "deep").mkdir()
        (tmp_path / "link").symlink_to(work)
        message = "--work: .*work holds .*, which --base reads; name another folder"
        with pytest.raises(UserError, match=message), work_folder(work, "passkey.py", {"--base": [work / inside]}):
            raise AssertionError("never begun")
        with work_folder(work, "passkey.py", {"--base": [tmp_path / "work-base", None]}):
            pass

    def test_a_file(self, tmp_path):
        (tmp_path / "work").write_text("mine")
        message = "is a file; name a folder"
        with pytest.raises(UserError, match=message), work_folder(tmp_path / "work", "passkey.py", {}):
            raise AssertionError("never begun")

    def test_two_programs(self, tmp_path):
        """K8."""
        work, message = tmp_path / "work", "another process is writing"
        with work_folder(work, "x", {}), pytest.raises(UserError, match=message), work_folder(work, "x", {}):
            raise AssertionError("never begun")
