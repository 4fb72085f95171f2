"""Which source files of Python's standard library are the demo's training texts, and which are held out?

The split depends on the path only, so pretraining and context extension hold out the same modules with every Python
version and on every machine.
"""

import hashlib
import re
import sysconfig
from pathlib import Path

FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}  # installed packages and caches
EXCLUDED = (
    "lib2to3/tests/data/",  # deliberately invalid files, test inputs of a parser
    *("_sysconfigdata_", "config-"),  # written when Python is built, different on every machine
)


def default_library() -> Path:
    """The standard library of the Python that runs this."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_files(library: Path) -> list[str]:
    """Sorted relative POSIX paths of the source files under a standard library folder.

    Left out: installed packages, caches, build-time files, and files that are empty or not UTF-8.
    """
    paths = sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py") if path.is_file())
    sources = (path for path in paths if not FOREIGN_FOLDERS & set(path.split("/")) and not path.startswith(EXCLUDED))
    return [path for path in sources if _is_text(library / path)]


def is_held_out(relative_path: str) -> bool:
    """Whether this module is held out: about 5 % are, chosen by a hash of the path.

    `re.py` and `re/__init__.py` count as one module, so it stays on its side when a later Python makes it a package.
    """
    module = relative_path.removesuffix("/__init__.py").removesuffix(".py") + ".py"
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % 20 == 0


def split_library(library: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(training files, held-out files), each {path: text}."""
    training: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in library_files(library):
        (held_out if is_held_out(path) else training)[path] = (library / path).read_text(encoding="utf-8")
    return training, held_out


def library_name(library: Path) -> str:
    """`CPython 3.11.7`, from the installation's C headers; without headers, the folder's name."""
    header = library.parent.parent / "include" / library.name / "patchlevel.h"
    found = re.search(r'PY_VERSION\s+"([^"]+)"', header.read_text()) if header.is_file() else None
    return f"CPython {found.group(1)}" if found else library.name


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return False
