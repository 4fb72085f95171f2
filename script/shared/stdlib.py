"""The demo's text: the source code of a Python standard library, which every Python installation brings along.

A file is held out by its path alone, so the same modules are held out of every Python version, on every machine, in
pretraining and in context extension alike.
"""

import hashlib
import re
import sysconfig
from pathlib import Path

FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}  # not the standard library, or not source
BROKEN_ON_PURPOSE = "lib2to3/tests/data/"  # inputs of a parser's tests
MACHINE_FILES = ("_sysconfigdata_", "config-")  # written when Python is built: other paths on every machine


def default_library() -> Path:
    """The standard library of the Python that runs this."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_files(library: Path) -> list[str]:
    """Sorted relative posix paths of the source files under a standard library folder.

    Left out: installed packages, caches, build-time files, and what is empty or not UTF-8.
    """
    return [path for path in sorted(_relative_paths(library)) if _is_source(path) and _is_text(library / path)]


def is_held_out(relative_path: str) -> bool:
    """Whether this module is kept from training: about 5 % are, chosen by a hash of the path and nothing else.

    `re.py` and `re/__init__.py` are one module: it keeps its side when a later Python turns it into a package.
    """
    module = relative_path.removesuffix("/__init__.py").removesuffix(".py") + ".py"
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % 20 == 0


def split_library(library: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Path to text of the training files, and of the held-out files."""
    training: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in library_files(library):
        (held_out if is_held_out(path) else training)[path] = (library / path).read_text(encoding="utf-8")
    return training, held_out


def library_name(library: Path) -> str:
    """`CPython 3.11.7`, as the C headers beside the library say; the folder's name where there are none."""
    header = library.parent.parent / "include" / library.name / "patchlevel.h"
    found = re.search(r'PY_VERSION\s+"([^"]+)"', header.read_text()) if header.is_file() else None
    return f"CPython {found.group(1)}" if found else library.name


def _relative_paths(library: Path) -> list[str]:
    return [path.relative_to(library).as_posix() for path in library.rglob("*.py") if path.is_file()]


def _is_source(relative_path: str) -> bool:
    if FOREIGN_FOLDERS & set(relative_path.split("/")):
        return False
    return not relative_path.startswith((BROKEN_ON_PURPOSE, *MACHINE_FILES))


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return False
