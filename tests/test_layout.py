"""Does the repository keep its rules for imports, sizes, tests and READMEs?

Code is parsed with `ast`, not imported.
"""

import ast
import functools
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from component.train.argument import LongQLoRAArguments
from tests.conftest import ROOT
from tests.source import CODE, COMPONENT, MODULES, SCRIPT, files, imported, is_program, mirrored, reached, tree

# Modules and packages of component/: what each may import from the others, besides error and itself.
MAY_IMPORT = {
    "error": "",
    "rope": "",
    "storage": "",
    "distributed": "",
    "float8": "",
    "cli": "",
    "quick_import": "",
    "attention": "distributed",
    "config": "storage",
    "adapter_config": "storage",
    "model": "config quick_import rope storage",
    "tokenizer": "storage",
    "checkpoint": "storage",
    "adapter": "adapter_config model storage",
    "shard": "config model rope storage",
    "data": "storage tokenizer",
    "loss": "data distributed float8",  # from data only IGNORE_INDEX, see LOSS_IMPORTS
    "card": "checkpoint model rope storage",
    "loading": "adapter checkpoint model rope storage tokenizer",
    "corpus": "data storage tokenizer",
    "memory": "adapter attention distributed float8 loss model",
    "merge": "adapter config loading loss model rope storage",
    "inference": "attention checkpoint cli data loading memory model rope storage tokenizer",
    "evaluate": "attention cli data distributed inference loading loss rope storage tokenizer",
    "train": "adapter attention card checkpoint cli data distributed float8 loss memory model rope storage",
}
LOSS_IMPORTS = "component.data"
# What a package must not import indirectly either.
NEVER = {
    "corpus": "model adapter peft",  # the builders must start fast, in many processes
    "merge": "evaluate",
    "train": "evaluate inference corpus merge",
}
# Imports between programs, besides those from script/shared and within script/experiment.
AMONG_PROGRAMS = {
    ("script/shared/benchmark_row.py", "script/performance/peers.py"): "names of the baselines to run",
    ("script/benchmark.py", "script/performance/report.py"): "its table and figures",
    ("script/experiment/measure.py", "script/evaluate/evaluate.py"): "many evaluations in one process",
}
LINES, FUNCTION_LINES, MAIN_LINES = 300, 60, 40  # limits of a module, a function, and main() in train.py
# Modules without their own test file, and why.
UNTESTED = {
    "component/attention/ulysses.py": "tests/component/attention/test_exchange.py, with all attention over processes",
    "script/demo/pretrain.py": "make demo",
    "script/experiment/figure.py": "plots the numbers of results.py; reviewed by eye",
    "script/experiment/pretrain.py": "script/shared/pretraining.py has tests; the rest is its flags",
    "script/experiment/train_rolled.py": "script/shared/rolled_attention.py has tests; the rest is train.py",
    "script/performance/evaluation.py": "times perplexity.py, which has tests, on models of 14 GB",
    "script/performance/merge.py": "times merge_lora.py, which has tests, on a model of 2.7 GB",
    "script/performance/train_by_heads.py": "script/shared/shift_short_by_heads.py has tests; the rest is train.py",
    "script/performance/real_shape.py": "runs programs that have tests on a model of 13 GB",
    "script/shared/shape.py": "its numbers are tested with random_model.py",
    "script/shared/training_flags.py": "flags of programs that others test",
}
READMES = {
    *("README.md", "train_args/README.md", "component/README.md", "script/README.md"),
    *(f"script/{folder}/README.md" for folder in ("data", "inference", "evaluate", "experiment", "performance")),
}
SET_BY_LAUNCHERS = {"--local_rank"}  # flags that users never type
PATHS = ("train_args/", "component/", "script/", "tests/", "figure/")
FILES = ("train.py", "Makefile", "requirements.txt", "pyproject.toml", "LICENSE", "README.md")
# files of other projects named in READMEs: file -> project
OF_OTHERS = {"convert_hf_to_gguf.py": "llama.cpp", "gguf-py/gguf/scripts/gguf_set_metadata.py": "llama.cpp"}


def package(module: str) -> str:
    """attention for component.attention.kernel, rope for component.rope, peft for peft.tuners."""
    parts = module.split(".")
    return (parts[1] if len(parts) > 1 else "") if parts[0] == "component" else parts[0]


def package_of(path: str) -> str:
    return package(path.removesuffix(".py").replace("/", "."))


def listing(problems: list[str]) -> str:
    return "\n  ".join(["", *problems])


# ---- imports


def test_packages_import_only_what_the_table_allows():
    problems = []
    for path in COMPONENT:
        if path == "component/__init__.py":
            continue
        own = package_of(path)
        allowed = {own, "error", "", *MAY_IMPORT.get(own, "").split()}
        for module in sorted(imported(path) & MODULES.keys()):
            too_much = own == "loss" and package(module) == "data" and module != LOSS_IMPORTS
            if not module.startswith("component") or package(module) not in allowed or too_much:
                problems.append(f"{path} imports {module}; {own} may import: {MAY_IMPORT.get(own) or 'nothing'}")
    assert not problems, listing(problems)


def test_the_table_has_every_package():
    assert MAY_IMPORT.keys() == {package_of(path) for path in COMPONENT} - {"__init__"}


@pytest.mark.parametrize("name", NEVER)
def test_forbidden_packages_are_not_imported_indirectly(name):
    problems = []
    for path in (path for path in COMPONENT if package_of(path) == name):
        chains = reached(path)
        problems += [chain for module, chain in chains.items() if package(module) in NEVER[name].split()]
    assert not problems, listing(sorted(problems))


def test_scripts_import_only_what_is_shared():
    problems, used = [], set()
    for path in (*COMPONENT, *SCRIPT):
        for module in sorted(imported(path) & MODULES.keys()):
            target = MODULES[module]
            is_sibling = path.startswith("script/experiment/") and target.startswith("script/experiment/")
            if target.startswith(("component/", "script/shared/")) or is_sibling:
                continue
            used.add((path, target))
            if (path, target) not in AMONG_PROGRAMS:
                problems.append(f"{path} imports {target}; put what both need in component/ or script/shared/")
    problems += [f"{path} no longer imports {target}: remove it" for path, target in AMONG_PROGRAMS.keys() - used]
    assert not problems, listing(problems)


def test_there_are_no_import_cycles():
    done: set[str] = set()

    def walk(path: str, chain: list[str]) -> None:
        assert path not in chain, " -> ".join([*chain[chain.index(path) :], path])
        if path not in done:
            for module in sorted(imported(path) & MODULES.keys()):
                walk(MODULES[module], [*chain, path])
            done.add(path)

    for path in COMPONENT:
        walk(path, [])


# ---- sizes


def test_modules_and_functions_are_short():
    problems = []
    for path in CODE:
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        problems += [f"{path} has {lines} lines, more than {LINES}"] if lines > LINES else []
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                limit = MAIN_LINES if (path, node.name) == ("train.py", "main") else FUNCTION_LINES
                problems += [f"{path}: {node.name} has {lines} lines, more than {limit}"] if lines > limit else []
    assert not problems, listing(problems)


# ---- test files


def test_each_module_has_its_tests():
    modules = [path for path in (*COMPONENT, *SCRIPT) if Path(path).name != "__init__.py"]
    without = {path for path in modules if not (ROOT / mirrored(path)).is_file()}
    problems = [f"{path} has no {mirrored(path)}" for path in sorted(without - UNTESTED.keys())]
    problems += [f"UNTESTED: {path} has tests or does not exist" for path in sorted(UNTESTED.keys() - without)]
    assert not problems, listing(problems)


def test_each_test_file_has_its_module():
    tests = [path for path in files("tests/component", "tests/script") if Path(path).name.startswith("test_")]
    known = {mirrored(path) for path in CODE}
    assert not set(tests) - known, listing([f"{path}: no such module" for path in sorted(set(tests) - known)])


# ---- READMEs


def text_of(readme: str) -> str:
    assert (ROOT / readme).is_file(), f"there is no {readme}"
    return (ROOT / readme).read_text(encoding="utf-8")


def words_of(text: str) -> list[str]:
    """Words without surrounding punctuation; {a,b}.py is expanded to a.py and b.py."""
    braces = re.compile(r"([^\s`{}]*)\{([\w,./]+)\}([^\s`{}]*)")
    text = braces.sub(lambda found: " ".join(found[1] + part + found[3] for part in found[2].split(",")), text)
    words = re.split(r"""[\s"'`()\[\],;|=]+""", text)
    return [re.sub(r"(::.*|:\d+.*|@\d+|[.:]+)$", "", word.removeprefix("./")) for word in words]


def code_in(text: str) -> str:
    """Code blocks and text in backticks."""
    block = re.compile(r"^```.*?^```", re.M | re.S)
    return "\n".join([*block.findall(text), *re.findall(r"`([^`\n]+)`", block.sub("", text))])


def is_there(word: str, readme: str) -> bool:
    if any(any(folder.glob(word)) for folder in (ROOT, (ROOT / readme).parent)):
        return True
    return word.endswith(".py") and (word in OF_OTHERS or any(path.endswith(f"/{word}") for path in KNOWN))


KNOWN = [*CODE, *files("tests")]


@pytest.mark.parametrize("readme", sorted(READMES))
def test_paths_in_a_readme_exist(readme):
    words = {word for word in words_of(code_in(text_of(readme))) if not re.search(r"[<>$…]|\.\.|^/", word)}
    paths = {word for word in words if word.startswith(PATHS) or word in FILES or re.fullmatch(r"[\w./-]+\.py", word)}
    assert not (gone := sorted(path for path in paths if not is_there(path, readme))), f"{readme} names {gone}"


def readme_of(path: str) -> str:
    """The nearest README above a program or module."""
    return next(name for folder in Path(path).parents if (name := str(folder / "README.md")) in READMES)


PROGRAMS = [path for path in ("train.py", *SCRIPT) if is_program(path)]
LISTED = [path for path in (*COMPONENT, *PROGRAMS) if Path(path).name != "__init__.py"]


@pytest.mark.parametrize("readme", sorted({readme_of(path) for path in LISTED}))
def test_a_readme_lists_its_programs_or_modules(readme):
    listed = Counter(Path(word).name for word in words_of(text_of(readme)))
    wanted = Counter(Path(path).name for path in LISTED if readme_of(path) == readme)
    assert not (missing := sorted((wanted - listed).elements())), f"{readme} does not list {missing}"


def flags_of(program: str) -> set[str]:
    """The flags of a program's parser, also those added by functions of component/ and script/shared/."""
    found, seen, waiting = set(), set(), [(program, "")]
    while waiting:
        path, function = waiting.pop()
        node = next((x for x in tree(path).body if getattr(x, "name", None) == function), None)
        node = node if function else tree(path)
        if node is None or (path, function) in seen:
            continue
        seen.add((path, function))
        origins = origins_of(path)
        for x in ast.walk(node):
            if isinstance(x, ast.Call) and getattr(x.func, "attr", "") == "add_argument" and x.args:
                assert isinstance(x.args[0], ast.Constant), f"{path}:{x.lineno}: write the flag as a literal"
                found |= {x.args[0].value} if x.args[0].value.startswith("--") else set()
            elif isinstance(x, ast.Name):
                file, name = origins.get(x.id, (path, x.id))
                waiting += [(file, name)] if file.startswith(("component/", "script/shared/")) else []
    return found - SET_BY_LAUNCHERS


@functools.cache
def origins_of(path: str) -> dict[str, tuple[str, str]]:
    """Names that a file imports -> (file that has them, or "", their name there)."""
    return {
        alias.asname or alias.name: (MODULES.get(x.module, ""), alias.name)
        for x in ast.walk(tree(path))
        if isinstance(x, ast.ImportFrom)
        for alias in x.names
    }


@pytest.mark.parametrize("readme", sorted({readme_of(path) for path in PROGRAMS}))
def test_a_readme_documents_exactly_the_flags_of_its_programs(readme):
    text, folder = text_of(readme), readme.removesuffix("README.md")
    documented, cells = set(re.findall(r"--\w+", text)), re.findall(r"^\s*\|([^|]*--\w[^|]*)\|", text, re.M)
    own, there = (
        [path for path in PROGRAMS if is_one(path)]
        for is_one in (lambda path: readme_of(path) == readme, lambda path: path.startswith(folder))
    )
    problems = [f"lacks {flag} of {path}" for path in own for flag in sorted(flags_of(path) - documented)]
    known = set().union(*map(flags_of, there))
    more = {flag for cell in cells for flag in re.findall(r"--\w+", cell)} - known
    problems += [f"has {flag}, which no program here takes" for flag in sorted(more)]
    assert not problems, f"{readme}" + listing(problems)


def test_the_readme_documents_exactly_the_yaml_keys():
    table = re.compile(r"^\|[^|\n]*\bkeys?\b[^\n]*\n\|[-:| ]+\n((?:\|[^\n]*\n)+)", re.M | re.I)
    tables = table.findall(text_of("train_args/README.md"))
    cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    documented = {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}
    ours, theirs = ({item.name for item in fields(of)} for of in (LongQLoRAArguments, TrainingArguments))
    assert not ours - documented, f"train_args/README.md lacks {sorted(ours - documented)}"
    assert not (more := documented - ours - theirs), f"train_args/README.md has {sorted(more)}, which are no keys"
