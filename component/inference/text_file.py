"""How is the text of a user's document read? From plain text or a PDF."""

import importlib.util
from pathlib import Path

from component.data.record import text_problem
from component.error import UserError
from component.inference.pdf import UnreadablePdf, extract_text

MOST_BYTES = {"text": 20_000_000, "PDF": 50_000_000}  # a PDF also holds pictures and fonts


def read_text_file(path: str | Path, field: str) -> str:
    """The text of a UTF-8 file, or of the pages of a PDF.

    Args:
        field: flag or command to name in error messages.

    Raises:
        UserError: no such file, a file that is too large, or cannot be read or decoded, or one without text.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{field}: there is no file {path}; name a text file")
    is_pdf = file.suffix.lower() == ".pdf"
    kind = "PDF" if is_pdf else "text"
    if (size := file.stat().st_size) > MOST_BYTES[kind]:
        most = f"at most {MOST_BYTES[kind] / 1e6:.0f} MB of {kind} are read"
        raise UserError(f"{field}: {path} has {size / 1e6:.1f} MB, but {most}; split it")
    text = _pdf_text(file, field) if is_pdf else _plain_text(file, field)
    if not text.strip():
        cure = "if its pages are scans, run OCR first" if is_pdf else "name another"
        raise UserError(f"{field}: {path} holds no text; {cure}")
    return text


def _plain_text(file: Path, field: str) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: {file} is not UTF-8 ({error.reason}); convert it") from error
    except OSError as error:
        raise UserError(f"{field}: {file} cannot be read ({error.strerror}); name another") from error
    if problem := text_problem(text):
        raise UserError(f"{field}: {file} {problem}")
    return text


def _pdf_text(file: Path, field: str) -> str:
    if importlib.util.find_spec("pypdf") is None:
        raise UserError(f"{field}: {file} is a PDF, which needs the package pypdf; pip install -r requirements.txt")
    try:
        text = extract_text(file)
    except UnreadablePdf as error:
        raise UserError(f"{field}: {file} {error}") from error
    return text.encode(errors="replace").decode()  # tokenizers refuse half of a surrogate pair
