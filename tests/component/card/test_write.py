"""README.md appears complete, and never in place of a user's."""

import shlex
import shutil
from pathlib import Path

import pytest

from component.card import write
from component.card.write import write_card
from component.storage.generated import is_unchanged


@pytest.fixture
def folder(adapter_folder, tmp_path) -> Path:
    return Path(shutil.copytree(adapter_folder, tmp_path / "run"))


def test_it_is_named_after_the_folder(folder, monkeypatch):
    assert write_card(folder)
    assert "\n# `run`\n" in (folder / "README.md").read_text()
    assert write_card(folder, "other")
    assert "\n# `other`\n" in (folder / "README.md").read_text()
    monkeypatch.chdir(folder)
    assert write_card(Path())
    assert "\n# `run`\n" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["changed", "own", "link"])
def test_a_users_card_is_replaced_only_when_asked(folder, kind, tmp_path, capsys):
    write_card(folder)
    card = folder / "README.md"
    if kind == "changed":
        card.write_text(card.read_text() + "Mine.")
    elif kind == "own":
        card.write_text("Mine.")
    else:
        card.replace(tmp_path / "notes.md")
        card.symlink_to(tmp_path / "notes.md")
    before = card.read_text()
    assert not write_card(folder)
    assert card.read_text() == before
    assert f"{card} is kept: you wrote or changed it" in capsys.readouterr().err
    assert write_card(folder, overwrite=True)
    assert is_unchanged(card)
    assert kind != "link" or (tmp_path / "notes.md").read_text() == before


def test_the_command_for_a_new_one_can_be_pasted(folder, capsys):
    folder = folder.rename(folder.with_name("my run; 1"))
    (folder / "README.md").write_text("Mine.")
    write_card(folder)
    command = capsys.readouterr().err.split("for a new one: ")[1]
    assert shlex.split(command)[-3:] == ["--folder", str(folder), "--overwrite"]


def test_a_failure_keeps_the_old_one(folder, monkeypatch):
    write_card(folder)
    before = (folder / "README.md").read_bytes()

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(write, "card_text", fails)
    with pytest.raises(OSError, match="disk full"):
        write_card(folder)
    assert (folder / "README.md").read_bytes() == before
    assert not list(folder.glob(".*"))
