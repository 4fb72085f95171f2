"""How is the text of a PDF extracted?"""

import struct
import time

import pytest
from pypdf import PdfReader, PdfWriter
from pypdf.generic import DecodedStreamObject, NameObject

from component.inference import pdf as module
from component.inference.pdf import UnreadablePdf, extract_text
from tests.pdf import pdf


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-128", "AES-256"])
@pytest.mark.parametrize(("password", "reads"), [("", True), ("secret", False)])
def test_k18_encryption(algorithm, password, reads, tmp_path):
    """An empty password encrypts for permissions only: every viewer opens the file."""
    (tmp_path / "plain.pdf").write_bytes(pdf("The treaty was signed.", "In spring."))
    writer = PdfWriter(clone_from=tmp_path / "plain.pdf")
    writer.encrypt(user_password=password, owner_password="owner", algorithm=algorithm)
    writer.write(tmp_path / "a.pdf")
    assert PdfReader(tmp_path / "a.pdf").is_encrypted
    if reads:
        assert extract_text(tmp_path / "a.pdf") == "The treaty was signed.\n\nIn spring."
    else:
        with pytest.raises(UnreadablePdf, match=r"^is password-protected; save it without a password$"):
            extract_text(tmp_path / "a.pdf")


class DependencyError(Exception):
    """Like pypdf's, for AES without cryptography."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RecursionError("deep"), '{"error": "is not a readable PDF (deep); export it again"}\n'),
        (ZeroDivisionError("deep"), '{"error": "is not a readable PDF (deep); export it again"}\n'),
        (struct.error("deep"), '{"error": "is not a readable PDF (deep); export it again"}\n'),
        (
            DependencyError("cryptography>=3.1 is required"),
            '{"error": "is encrypted with AES, which needs cryptography; pip install -r requirements.txt"}\n',
        ),
    ],
)
def test_k18_whatever_the_parser_raises(error, said, child, capsys):
    child(error)
    module.main()
    assert capsys.readouterr().out == said


@pytest.fixture
def child(monkeypatch):
    """Lets main() run in this process, with a parser that raises an error; limits are recorded."""

    def prepare(error: Exception) -> list:
        def parse(_):
            raise error

        limits: list = []
        monkeypatch.setattr(module, "_parse", parse)
        monkeypatch.setattr(module.os, "nice", limits.append)
        monkeypatch.setattr(module.resource, "setrlimit", lambda *limit: limits.append(limit))
        monkeypatch.setattr(module.sys, "argv", ["pdf", "a.pdf"])
        return limits

    return prepare


def shared_stream(file, pages: int, content: bytes) -> None:
    """`pages` pages with one content stream, which is parsed anew for each of them."""
    writer = PdfWriter(clone_from=file)
    stream = DecodedStreamObject()
    stream.set_data(content)
    place = writer._add_object(stream.flate_encode())
    writer.pages[0][NameObject("/Contents")] = place
    for _ in range(pages - 1):
        writer.add_page(writer.pages[0])
        writer.pages[-1][NameObject("/Contents")] = place
    writer.write(file)


class TestBounds:
    @pytest.fixture
    def file(self, tmp_path):
        (tmp_path / "a.pdf").write_bytes(pdf("One.", "Two."))
        return tmp_path / "a.pdf"

    def test_k19_seconds(self, file, monkeypatch):
        shared_stream(file, 200, b"BT /F1 12 Tf 72 720 Td " + b"(one word) Tj T* " * 30_000 + b"ET")
        assert file.stat().st_size < 100_000
        monkeypatch.setattr(module, "SECONDS", 2)
        start = time.monotonic()
        with pytest.raises(UnreadablePdf, match="was not read after 2 seconds; export it again"):
            extract_text(file)
        assert time.monotonic() - start < 5

    def test_k19_pages(self, file, monkeypatch):
        monkeypatch.setattr(module, "MOST_PAGES", 1)
        with pytest.raises(UnreadablePdf, match="has 2 pages, more than 1; split it"):
            module._parse(str(file))

    def test_k19_characters(self, file, monkeypatch):
        monkeypatch.setattr(module, "MOST_CHARACTERS", 7)
        with pytest.raises(UnreadablePdf, match="has more than 7 characters of text; split it"):
            module._parse(str(file))

    def test_k19_memory(self, child):
        limits = child(MemoryError())
        with pytest.raises(SystemExit, match="1"):
            module.main()
        assert limits == [10, (module.resource.RLIMIT_AS, (384 * 2**20, 384 * 2**20))]

    def test_k19_a_child_that_was_killed(self, file, monkeypatch):
        monkeypatch.setattr(module.sys, "executable", "false")
        with pytest.raises(UnreadablePdf, match="cannot be parsed within 384 MiB of memory; export it again"):
            extract_text(file)
