"""What text is in a file that a user brings?"""

import pytest

from component.error import UserError
from component.inference.text_file import read_text_file
from tests.pdf import pdf


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "Größe\n".encode(), "Größe\n"),
        ("a.md", b"\xef\xbb\xbf# Title", "# Title"),
        ("a.pdf", pdf("The first page.", "The second."), "The first page.\n\nThe second."),
        ("A.PDF", pdf("One."), "One."),
    ],
)
def test_the_text(name, content, text, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_text_file(tmp_path / name, "/file") == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "/file: there is no file .*a.txt; name a text file"),
        ("a.txt", b"caf\xe9", "/file: .*a.txt is not UTF-8 .*; convert it"),
        ("a.txt", b" \n", "/file: .*a.txt holds no text; name another"),
        ("a.pdf", pdf(""), "/file: .*a.pdf holds no text; it may hold pictures"),
        ("a.pdf", b"%PDF-1.4 and no more", "/file: .*a.pdf is no PDF that can be read .*; save it anew"),
        ("a.pdf", b"", "/file: .*a.pdf is no PDF"),
    ],
)
def test_what_is_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text_file(tmp_path / name, "/file")


def test_a_password(tmp_path):
    from pypdf import PdfWriter

    (tmp_path / "open.pdf").write_bytes(pdf("Secret."))
    writer = PdfWriter(clone_from=tmp_path / "open.pdf")
    writer.encrypt("pass", algorithm="RC4-128")
    writer.write(tmp_path / "shut.pdf")
    with pytest.raises(UserError, match=r"shut.pdf is protected by a password; save it without one"):
        read_text_file(tmp_path / "shut.pdf", "/file")


def test_without_pypdf(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(pdf("One."))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a.pdf is a PDF, which needs the package pypdf; pip install -r"):
        read_text_file(tmp_path / "a.pdf", "/file")
