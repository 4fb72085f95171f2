"""model_card.py: renews a card, and refuses what is no folder of this project."""

import shutil
from pathlib import Path

import pytest

from component.storage.generated import is_unchanged

PROGRAM = "script/model_card.py"


@pytest.fixture
def folder(adapter_folder, tmp_path) -> Path:
    return Path(shutil.copytree(adapter_folder, tmp_path / "run"))


def test_it_writes_and_renews(run_program, folder):
    for _ in range(2):
        done = run_program(PROGRAM, "--folder", folder)
        assert (done.status, done.out) == (0, f"{folder / 'README.md'}: written\n")
        assert is_unchanged(folder / "README.md")
    assert "A LoRA adapter for" in (folder / "README.md").read_text()


def test_a_users_card_needs_overwrite(run_program, folder):
    (folder / "README.md").write_text("Mine.")
    done = run_program(PROGRAM, "--folder", folder)
    assert done.status == 1
    assert "replace it with --overwrite" in done.err
    assert (folder / "README.md").read_text() == "Mine."
    assert run_program(PROGRAM, "--folder", folder, "--overwrite").status == 0
    assert is_unchanged(folder / "README.md")


def test_a_link_to_nothing_is_a_users(run_program, folder, tmp_path):
    (folder / "README.md").symlink_to(tmp_path / "not here yet.md")
    done = run_program(PROGRAM, "--folder", folder)
    assert (done.status, done.out) == (1, "")
    assert "replace it with --overwrite" in done.err
    assert run_program(PROGRAM, "--folder", folder, "--overwrite").status == 0
    assert is_unchanged(folder / "README.md")


@pytest.mark.parametrize("what", ["base", "nothing", "incomplete"])
def test_other_folders_are_refused(run_program, folder, base_folder, tmp_path, what):
    (folder / "tokenizer.json").unlink()
    named = {"base": base_folder, "nothing": tmp_path / "nothing", "incomplete": folder}[what]
    done = run_program(PROGRAM, "--folder", named)
    assert done.status == 1
    assert str(named) in done.err
    assert "Traceback" not in done.err
    assert not (named / "README.md").exists()
