"""How is the text of a user's document read?"""

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
        ("a.txt", bytes(2000), "/file: .*a.txt is not text: it has a zero byte at 0; convert it to UTF-8"),
        ("a.txt", "One.".encode("utf-16-le"), "/file: .*a.txt is not text: it has a zero byte at 1; convert it"),
        ("a.txt", b" \n", "/file: .*a.txt holds no text; name another"),
        ("a.pdf", pdf(""), "/file: .*a.pdf holds no text; if its pages are scans, run OCR first"),
        ("a.pdf", b"%PDF-1.4 and no more", "/file: .*a.pdf is not a readable PDF .*; export it again"),
        ("a.pdf", b"", "/file: .*a.pdf is not a readable PDF"),
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
    writer.write(tmp_path / "locked.pdf")
    with pytest.raises(UserError, match=r"locked.pdf is password-protected; save it without a password"):
        read_text_file(tmp_path / "locked.pdf", "/file")


def test_without_pypdf(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(pdf("One."))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a.pdf is a PDF, which needs the package pypdf; pip install -r"):
        read_text_file(tmp_path / "a.pdf", "/file")


@pytest.mark.parametrize(("name", "size"), [("a.txt", 20_000_001), ("a.pdf", 50_000_001)])
def test_k19_bytes(name, size, tmp_path):
    with (tmp_path / name).open("wb") as file:
        file.truncate(size)
    kind = {"a.txt": r"20.0 MB, but at most 20 MB of text", "a.pdf": r"50.0 MB, but at most 50 MB of PDF"}[name]
    with pytest.raises(UserError, match=f"document: .*{name} has {kind} are read; split it"):
        read_text_file(tmp_path / name, "document")
