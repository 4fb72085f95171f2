"""What text is in a file that a user brings? Plain text, or the text of a PDF."""

import importlib.util
from pathlib import Path

from component.error import UserError, first_line


def read_text_file(path: str | Path, field: str) -> str:
    """The text of a UTF-8 file, or of the pages of a PDF.

    Args:
        field: where the user named the file, for messages.

    Raises:
        UserError: no file, no text in it, or bytes that are none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{field}: there is no file {path}; name a text file")
    text = _pdf_text(file, field) if file.suffix.lower() == ".pdf" else _plain_text(file, field)
    if not text.strip():
        cure = "it may hold pictures of pages only: recognise its text first" if file.suffix.lower() == ".pdf" else ""
        raise UserError(f"{field}: {path} holds no text; {cure or 'name another'}")
    return text


def _plain_text(file: Path, field: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: {file} is not UTF-8 ({error.reason}); convert it") from error
    except OSError as error:
        raise UserError(f"{field}: {file} cannot be read ({error.strerror}); name another") from error


def _pdf_text(file: Path, field: str) -> str:
    if importlib.util.find_spec("pypdf") is None:
        raise UserError(f"{field}: {file} is a PDF, which needs the package pypdf; pip install -r requirements.txt")
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(file)
        if reader.is_encrypted and not reader.decrypt(""):
            raise UserError(f"{field}: {file} is protected by a password; save it without one")
        return "\n\n".join(page.extract_text() for page in reader.pages)
    except (PyPdfError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{field}: {file} is no PDF that can be read ({first_line(error)}); save it anew") from error
