"""How is the text of a user's document read? From plain text or a PDF."""

import importlib.util
from pathlib import Path

from component.error import UserError, first_line


def read_text_file(path: str | Path, field: str) -> str:
    """The text of a UTF-8 file, or of the pages of a PDF.

    Args:
        field: flag or command to name in error messages.

    Raises:
        UserError: no such file, a file that cannot be read or decoded, or one without text.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{field}: there is no file {path}; name a text file")
    is_pdf = file.suffix.lower() == ".pdf"
    text = _pdf_text(file, field) if is_pdf else _plain_text(file, field)
    if not text.strip():
        cure = "if its pages are scans, run OCR first" if is_pdf else "name another"
        raise UserError(f"{field}: {path} holds no text; {cure}")
    return text


def _plain_text(file: Path, field: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # without a byte order mark
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
            raise UserError(f"{field}: {file} is password-protected; save it without a password")
        return "\n\n".join(page.extract_text() for page in reader.pages)
    except (PyPdfError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{field}: {file} is not a readable PDF ({first_line(error)}); export it again") from error
