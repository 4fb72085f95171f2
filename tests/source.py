"""The repository's files and imports, parsed with `ast` without importing anything."""

import ast
from functools import cache
from pathlib import Path

from tests.conftest import ROOT


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def files(*folders: str) -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for folder in folders for file in (ROOT / folder).rglob("*.py"))


COMPONENT, SCRIPT = files("component"), files("script")
CODE = ["train.py", *COMPONENT, *SCRIPT]
MODULES = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in CODE}


def imported(path: str) -> set[str]:
    """Dotted names of all modules that a file imports, also inside functions."""
    found, waiting = set(), [tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) | ({node.module} if names - MODULES.keys() else set())
        else:
            waiting += ast.iter_child_nodes(node)
    return found


def reached(path: str) -> dict[str, str]:
    """Modules imported directly and indirectly by `path`, each with its import chain."""
    chains, waiting = {}, [(path, path)]
    while waiting:
        file, chain = waiting.pop()
        for name in imported(file):
            # importing a.b.c runs a/__init__.py and a/b/__init__.py first
            for part in [name[:at] for at, letter in enumerate(name) if letter == "."] + [name]:
                if part not in chains:
                    chains[part] = f"{chain} -> {part}"
                    waiting += [(MODULES[part], chains[part])] if part in MODULES else []
    return chains


def mirrored(path: str) -> str:
    """Path of a module's test file."""
    return f"tests/{Path(path).parent}/test_{Path(path).name}"


def is_program(path: str) -> bool:
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree(path).body)
