"""How is the text of a PDF extracted? In a process of its own, with bounds on its time, memory, pages and text.

A PDF is a program for its parser: 85 KB can ask for minutes and gigabytes. The child process has a lower priority, so
the model and other visitors go on.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from component.error import first_line

SECONDS = 30
MEMORY_BYTES = 384 * 2**20  # address space; Python and pypdf take about 60 MiB of it
MOST_PAGES = 5000
MOST_CHARACTERS = 20_000_000
ROOT = Path(__file__).resolve().parents[2]


class UnreadablePdf(Exception):
    """The message goes on after the file's name, and ends with the cure."""


def extract_text(file: Path) -> str:
    """Text of all pages, with an empty line between pages.

    Raises:
        UnreadablePdf: a bound was exceeded, a password is needed, or whatever the parser raised.
    """
    command = [sys.executable, "-m", "component.inference.pdf", str(file.resolve())]
    try:
        child = subprocess.run(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        message = f"was not read after {SECONDS} seconds; export it again, or split it, or convert it to text"
        raise UnreadablePdf(message) from error
    if child.returncode != 0:
        message = f"cannot be parsed within {MEMORY_BYTES >> 20} MiB of memory; export it again, or convert it to text"
        raise UnreadablePdf(message)
    result = json.loads(child.stdout)
    if "error" in result:
        raise UnreadablePdf(result["error"])
    return result["text"]


def _parse(path: str) -> str:
    from pypdf import PdfReader

    reader = PdfReader(path)
    if reader.is_encrypted and not reader.decrypt(""):
        raise UnreadablePdf("is password-protected; save it without a password")
    if len(reader.pages) > MOST_PAGES:
        raise UnreadablePdf(f"has {len(reader.pages):,} pages, more than {MOST_PAGES:,}; split it")
    texts, characters = [], 0
    for page in reader.pages:
        texts.append(page.extract_text())
        characters += len(texts[-1])
        if characters > MOST_CHARACTERS:
            raise UnreadablePdf(f"has more than {MOST_CHARACTERS:,} characters of text; split it")
    return "\n\n".join(texts)


def main() -> None:
    """The child process: one JSON object with `text` or `error` on standard output."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        result = {"text": _parse(sys.argv[1])}
    except UnreadablePdf as error:
        result = {"error": str(error)}
    except MemoryError:
        sys.exit(1)
    except Exception as error:  # whatever the parser raises; its exceptions are of dozens of types
        if type(error).__name__ == "DependencyError":  # pypdf's; the import may be what failed
            result = {"error": "is encrypted with AES, which needs cryptography; pip install -r requirements.txt"}
        else:
            result = {"error": f"is not a readable PDF ({first_line(error)}); export it again"}
    print(json.dumps(result))  # ASCII: half of a surrogate pair, which some fonts map to, passes too


if __name__ == "__main__":
    main()
