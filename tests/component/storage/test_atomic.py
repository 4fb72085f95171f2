"""A folder is there whole or not at all, whoever is killed while writing it."""

import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from component.error import UserError
from component.storage.atomic import atomic_file, atomic_folder, check_target
from tests.conftest import ROOT


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def test_atomic_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("all of them")
        (folder / "more").mkdir()
        (folder / "more" / "file").write_text("")
        assert not target.exists()
        assert folder.parent == target.parent  # a rename within one file system
    assert names(tmp_path) == {"deep", "deep/model", "deep/model/weights", "deep/model/more", "deep/model/more/file"}
    assert (target / "weights").read_text() == "all of them"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_atomic_folder_leaves_nothing_behind(tmp_path, error):
    def write(folder: Path):
        (folder / "weights").write_text("half of them")
        raise error

    with pytest.raises(error), atomic_folder(tmp_path / "model") as folder:
        write(folder)
    assert names(tmp_path) == set()


def test_atomic_file_takes_its_place_at_the_end_or_never(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(TypeError), atomic_file(tmp_path / "file") as writing, writing.open("w") as half:
        half.write("half") + None
    assert (names(tmp_path), (tmp_path / "file").read_text()) == ({"file"}, "old")
    with atomic_file(str(tmp_path / "file")) as writing:
        writing.write_text("new")
        assert (writing.parent, (tmp_path / "file").read_text()) == (tmp_path, "old")
    assert (names(tmp_path), (tmp_path / "file").read_text()) == ({"file"}, "new")


def test_atomic_folder_overwrites_nothing(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("")
    with pytest.raises(OSError), atomic_folder(tmp_path / "model") as folder:  # noqa: PT011
        (folder / "weights").write_text("")
    assert names(tmp_path) == {"model", "model/precious"}


def test_atomic_folder_is_as_readable_as_any_other(tmp_path):
    """mkdtemp makes private folders, and safetensors private files: others serve the model, too."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("")
    with atomic_folder(tmp_path / "model") as folder:
        save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    assert mode(tmp_path / "model") == mode(tmp_path / "plain")
    assert mode(tmp_path / "model" / "model.safetensors") == mode(tmp_path / "plain" / "file")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    program = (
        "import os, pathlib, signal, component.storage.atomic\n"
        f"with component.storage.atomic.atomic_folder(pathlib.Path({str(tmp_path / 'model')!r})) as folder:\n"
        "    (folder / 'half').mkdir(); (folder / 'half' / 'weights').write_text('')\n"
        "    (folder / 'config').write_text(''); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == {
        ".model.writing",
        ".model.writing/config",
        ".model.writing/half",
        ".model.writing/half/weights",
    }
    with atomic_folder(tmp_path / "model") as folder:
        assert names(folder) == set()
        (folder / "weights").write_text("all of them")
    assert names(tmp_path) == {"model", "model/weights"}


def test_one_process_at_a_time(tmp_path):
    """Another one's folder is neither written to nor removed."""
    folder = tmp_path / ".model.writing"
    folder.mkdir()
    (folder / "weights").write_text("half of them")
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another process"), atomic_folder(tmp_path / "model"):
            raise AssertionError("not reached")
    finally:
        os.close(handle)
    assert names(tmp_path) == {".model.writing", ".model.writing/weights"}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwriting(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    (tmp_path / "model" / "part").mkdir(parents=True)
    (tmp_path / "model" / "part" / "old").write_text("")
    with pytest.raises(UserError), atomic_folder(tmp_path / "model", overwrite=True):
        raise UserError("stopped")
    assert names(tmp_path) == {"model", "model/part", "model/part/old"}
    with atomic_folder(tmp_path / "model", overwrite=True) as folder:
        (folder / "new").write_text("")
        assert (tmp_path / "model" / "part" / "old").exists()
    assert names(tmp_path) == {"model", "model/new"}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_link_stays_and_its_folder_is_overwritten(tmp_path, monkeypatch, can_exchange):
    """The folder may be on another disk, and known by other names too."""
    if not can_exchange:
        monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "disk" / "model" / "old").write_text("")
    (tmp_path / "link").symlink_to("disk/model")
    with atomic_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "new").write_text("")
        assert folder.parent == tmp_path / "disk"
    assert names(tmp_path) == {"link", "disk", "disk/model", "disk/model/new"}
    assert (tmp_path / "link").readlink() == Path("disk/model")


def test_a_link_to_nothing_yet(tmp_path):
    (tmp_path / "link").symlink_to("disk/model")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "new").write_text("")
    assert names(tmp_path) == {"link", "disk", "disk/model", "disk/model/new"}


@pytest.mark.parametrize("name", ["x", "x/y"])
def test_where_no_folder_can_be_created(name):
    """The message has the folder that was asked for."""
    with pytest.raises(UserError, match=rf"^/proc/{name} can't be created"), atomic_folder(Path("/proc") / name):
        raise AssertionError("not reached")


def test_what_exists_needs_overwrite(tmp_path):
    (tmp_path / "model").mkdir()
    check_target(tmp_path / "model", "--save_path", overwrite=True)
    check_target(tmp_path / "new", "--save_path", overwrite=False)
    for name, overwrite, reason in (
        ("model", False, "--overwrite"),
        ("model", None, "remove"),
    ):
        with pytest.raises(UserError, match=reason):
            check_target(tmp_path / name, "--save_path", overwrite)
