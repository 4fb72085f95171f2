"""Generated files are told from those that a user wrote or changed."""

import pytest

from component.storage.generated import is_unchanged, marked

TEXT = "# A model\n\nGröße: 東京\n"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "README.md").write_text(marked(TEXT), encoding="utf-8")
    return tmp_path / "README.md"


def test_what_was_generated_is_recognized(file):
    assert is_unchanged(file)
    assert file.read_text(encoding="utf-8").startswith(TEXT)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("model", "Model"),
        lambda text: text + "My own notes.\n",
        lambda text: "My own notes.\n" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.rstrip("\n"),
        lambda text: TEXT,
        lambda text: "",
    ],
)
def test_any_change_makes_it_the_users(file, change):
    file.write_bytes(change(file.read_text(encoding="utf-8")).encode())
    assert not is_unchanged(file)


def test_no_text_and_no_file(tmp_path, file):
    (tmp_path / "binary").write_bytes(b"\xff\xfe" + file.read_bytes())
    (tmp_path / "link").symlink_to(file)
    for name in ("binary", "link", "missing", "."):
        assert not is_unchanged(tmp_path / name)
