"""The demo's texts: which files of the standard library are read, and which are held out."""

import pytest

from script.shared.stdlib import is_held_out, library_files, library_name, split_library


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "lib" / "python3.99"
    files = {
        "abc.py": b"a",
        "json/__init__.py": b"b",
        "empty.py": b"",
        "latin.py": b"\xff",
        "notes.txt": b"c",
        "site-packages/x.py": b"d",
        "json/__pycache__/y.py": b"e",
        "lib2to3/tests/data/bad.py": b"f",
        "_sysconfigdata_linux.py": b"g",
        "config-3.99/python-config.py": b"h",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_source_files(library):
    assert library_files(library) == ["abc.py", "json/__init__.py"]
    training, held_out = split_library(library)
    assert training | held_out == {"abc.py": "a", "json/__init__.py": "b"}
    assert not training.keys() & held_out.keys()


def test_held_out_modules():
    """By SHA-256 of the path modulo 20; a module that becomes a package stays on its side."""
    names = [f"module_{number}.py" for number in range(40)]
    assert [name for name in names if is_held_out(name)] == ["module_3.py", "module_21.py", "module_31.py"]
    assert is_held_out("module_3/__init__.py")
    assert not is_held_out("module_0/__init__.py")


def test_library_name(library):
    assert library_name(library) == "python3.99"
    header = library.parent.parent / "include" / "python3.99" / "patchlevel.h"
    header.parent.mkdir(parents=True)
    header.write_text('#define PY_MAJOR_VERSION 3\n#define PY_VERSION      "3.99.1"\n')
    assert library_name(library) == "CPython 3.99.1"
