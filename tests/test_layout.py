"""Is the house in order? Who imports whom, how long things are, and whether tests and READMEs are beside the code.

Code is read with `ast`, not imported. Each test names the file, and what it breaks.
"""

import ast
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from component.train.argument import LongQLoRAArguments
from tests.conftest import ROOT
from tests.source import CODE, COMPONENT, MODULES, SCRIPT, files, imported, is_program, mirrored, reached, tree

# What a module or package of component/ may import of the others, besides error and itself.
MAY_IMPORT = {
    "error": "",
    "rope": "",
    "storage": "",
    "distributed": "",
    "cli": "",
    "attention": "distributed",
    "model": "rope",
    "tokenizer": "storage",
    "checkpoint": "storage",
    "adapter": "model storage",
    "data": "storage tokenizer",
    "loss": "data distributed",  # of data only IGNORE_INDEX: LOSS_SEES
    "loading": "adapter checkpoint model rope tokenizer",
    "corpus": "data storage tokenizer",
    "memory": "adapter attention distributed loss model",
    "merge": "adapter loading loss model rope storage",
    "inference": "checkpoint cli data loading rope",
    "evaluate": "cli data distributed inference loading loss rope storage tokenizer",
    "train": "adapter attention checkpoint data distributed loss memory model rope storage",
}
LOSS_SEES = "component.data"
# What must not be reached either, through any number of modules.
NEVER = {
    "corpus": "model adapter peft",  # the builders start in seconds, and in many processes
    "merge": "evaluate",
    "train": "evaluate inference corpus merge",
}
# Imports among scripts, besides those of script/shared and those inside of script/experiment, and of train.py.
AMONG_PROGRAMS = {
    ("script/benchmark.py", "script/performance/peers.py"): "the names of the baselines that it starts",
    ("script/benchmark.py", "script/performance/report.py"): "the table and the figures that it writes",
    (
        "script/experiment/measure.py",
        "script/evaluate/evaluate.py",
    ): "many evaluations in one process, not a start each",
}
LINES, FUNCTION_LINES, MAIN_LINES = 300, 60, 40  # of a module, of a function, of main() in train.py
# Modules without a test file of their own, and what tests them instead.
UNTESTED = {
    **dict.fromkeys(["script/demo/data.py", "script/demo/demo.py", "script/demo/pretrain.py"], "make demo"),
    "script/experiment/downstream/tuning.py": "starts other programs for minutes; they have tests",
    "script/experiment/figure.py": "its numbers are those of results.py; pictures are looked at",
    "script/experiment/pretrain.py": "script/shared/pretraining.py has tests; the rest is its flags",
    "script/experiment/report.py": "a table of what results.py gathers",
    "script/experiment/run.py": "starts train.py and evaluate.py for hours; they have tests",
    "script/experiment/tokenizer.py": "script/shared/pretraining.py has tests; the rest is its flags",
    "script/experiment/train_rolled.py": "script/shared/rolled_attention.py has tests; the rest is train.py",
    "script/experiment/train_full.py": "the Trainer of transformers as it is, for comparison",
    "script/performance/evaluation.py": "times perplexity.py, which has tests, on models of 14 GB",
    "script/performance/long_run.py": "hundreds of GPU steps under the cap of a small card",
    "script/performance/merge.py": "times merge_lora.py, which has tests, on a model of 2.7 GB",
    "script/performance/real_shape.py": "starts the product's programs on a model of 13 GB",
    "script/shared/card.py": "measures a GPU",
    "script/shared/random_llama.py": "tests/script/test_benchmark.py, slow, trains what it makes",
}
READMES = {
    *("README.md", "train_args/README.md", "component/README.md", "script/README.md"),
    *(f"script/{folder}/README.md" for folder in ("data", "inference", "evaluate", "experiment", "performance")),
}
SET_BY_LAUNCHERS = {"--local_rank"}  # flags that nobody types
PATHS = ("train_args/", "component/", "script/", "tests/", "figure/")
FILES = ("train.py", "Makefile", "requirements.txt", "pyproject.toml", "LICENSE", "README.md")
OF_OTHERS: dict[str, str] = {}  # files of other projects that our READMEs name: file -> whose


def room(module: str) -> str:
    """attention of component.attention.kernel, rope of component.rope, peft of peft.tuners."""
    parts = module.split(".")
    return (parts[1] if len(parts) > 1 else "") if parts[0] == "component" else parts[0]


def room_of(path: str) -> str:
    return room(path.removesuffix(".py").replace("/", "."))


def told(problems: list[str]) -> str:
    return "\n  ".join(["", *problems])


# ---- who imports whom


def test_packages_import_only_what_the_table_allows():
    problems = []
    for path in COMPONENT:
        if path == "component/__init__.py":
            continue
        own = room_of(path)
        allowed = {own, "error", "", *MAY_IMPORT.get(own, "").split()}
        for module in sorted(imported(path) & MODULES.keys()):
            too_much = own == "loss" and room(module) == "data" and module != LOSS_SEES
            if not module.startswith("component") or room(module) not in allowed or too_much:
                problems.append(f"{path} imports {module}; {own} may import: {MAY_IMPORT.get(own) or 'nothing'}")
    assert not problems, told(problems)


def test_the_table_has_every_package():
    assert MAY_IMPORT.keys() == {room_of(path) for path in COMPONENT} - {"__init__"}


@pytest.mark.parametrize("package", NEVER)
def test_what_is_never_imported_is_not_reached_either(package):
    problems = []
    for path in (path for path in COMPONENT if room_of(path) == package):
        chains = reached(path)
        problems += [chain for module, chain in chains.items() if room(module) in NEVER[package].split()]
    assert not problems, told(sorted(problems))


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
    problems += [
        f"{path} no longer imports {target}: out of the list" for path, target in AMONG_PROGRAMS.keys() - used
    ]
    assert not problems, told(problems)


def test_no_import_goes_round_in_a_circle():
    done: set[str] = set()

    def walk(path: str, way: list[str]) -> None:
        assert path not in way, "a circle of imports: " + " -> ".join([*way[way.index(path) :], path])
        if path not in done:
            for module in sorted(imported(path) & MODULES.keys()):
                walk(MODULES[module], [*way, path])
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
    assert not problems, told(problems)


# ---- tests beside code


def test_each_module_has_its_tests():
    modules = [path for path in (*COMPONENT, *SCRIPT) if Path(path).name != "__init__.py"]
    without = {path for path in modules if not (ROOT / mirrored(path)).is_file()}
    problems = [f"{path} has no {mirrored(path)}" for path in sorted(without - UNTESTED.keys())]
    problems += [f"{path} has tests, or is gone: out of UNTESTED" for path in sorted(UNTESTED.keys() - without)]
    assert not problems, told(problems)


def test_each_test_file_has_its_module():
    tests = [path for path in files("tests/component", "tests/script") if Path(path).name.startswith("test_")]
    known = {mirrored(path) for path in CODE}
    assert not set(tests) - known, told([f"{path}: no such module" for path in sorted(set(tests) - known)])


# ---- READMEs


def text_of(readme: str) -> str:
    assert (ROOT / readme).is_file(), f"there is no {readme}"
    return (ROOT / readme).read_text(encoding="utf-8")


def words_of(text: str) -> list[str]:
    """Its words, with {a,b}.py as a.py and b.py, and without what stands around them."""
    braces = re.compile(r"([^\s`{}]*)\{([\w,./]+)\}([^\s`{}]*)")
    text = braces.sub(lambda found: " ".join(found[1] + part + found[3] for part in found[2].split(",")), text)
    words = re.split(r"""[\s"'`()\[\],;|=]+""", text)
    return [re.sub(r"(::.*|:\d+.*|@\d+|[.:]+)$", "", word.removeprefix("./")) for word in words]


def code_in(text: str) -> str:
    """Code blocks, and what stands in backticks."""
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
    """The nearest one above a program or module."""
    return next(name for folder in Path(path).parents if (name := str(folder / "README.md")) in READMES)


PROGRAMS = [path for path in ("train.py", *SCRIPT) if is_program(path)]
LISTED = [path for path in (*COMPONENT, *PROGRAMS) if Path(path).name != "__init__.py"]


@pytest.mark.parametrize("readme", sorted({readme_of(path) for path in LISTED}))
def test_a_readme_lists_its_programs_or_modules(readme):
    listed = Counter(Path(word).name for word in words_of(text_of(readme)))
    wanted = Counter(Path(path).name for path in LISTED if readme_of(path) == readme)
    assert not (lacking := sorted((wanted - listed).elements())), f"{readme} does not list {lacking}"


def flags_of(path: str, function: str | None = None, seen: frozenset = frozenset()) -> set[str]:
    """The flags that a program adds to its parser, itself and through functions of component/ and script/shared/."""
    body = tree(path).body
    node = next((x for x in body if getattr(x, "name", None) == function), None) if function else tree(path)
    if node is None or (path, function) in seen:
        return set()
    origins = {
        alias.asname or alias.name: (MODULES.get(x.module, ""), alias.name)
        for x in ast.walk(tree(path))
        if isinstance(x, ast.ImportFrom)
        for alias in x.names
    }
    found = set()
    for x in ast.walk(node):
        if isinstance(x, ast.Call) and getattr(x.func, "attr", "") == "add_argument" and x.args:
            assert isinstance(x.args[0], ast.Constant), f"{path}:{x.lineno}: write the flag's name out"
            found |= {x.args[0].value} if x.args[0].value.startswith("--") else set()
        elif isinstance(x, ast.Name):
            file, name = origins.get(x.id, (path, x.id))
            if file.startswith(("component/", "script/shared/")):
                found |= flags_of(file, name, seen | {(path, function)})
    return found - SET_BY_LAUNCHERS


@pytest.mark.parametrize("readme", sorted({readme_of(path) for path in PROGRAMS}))
def test_a_readme_tells_every_flag_and_no_other(readme):
    text, folder = text_of(readme), readme.removesuffix("README.md")
    told_of, cells = set(re.findall(r"--\w+", text)), re.findall(r"^\s*\|([^|]*--\w[^|]*)\|", text, re.M)
    own, there = (
        [path for path in PROGRAMS if is_one(path)]
        for is_one in (lambda path: readme_of(path) == readme, lambda path: path.startswith(folder))
    )
    problems = [f"lacks {flag} of {path}" for path in own for flag in sorted(flags_of(path) - told_of)]
    known = set().union(*map(flags_of, there))
    more = {flag for cell in cells for flag in re.findall(r"--\w+", cell)} - known
    problems += [f"has {flag}, which no program here takes" for flag in sorted(more)]
    assert not problems, f"{readme}" + told(problems)


def test_the_table_of_keys_is_that_of_the_yaml():
    table = re.compile(r"^\|[^|\n]*\bkeys?\b[^\n]*\n\|[-:| ]+\n((?:\|[^\n]*\n)+)", re.M | re.I)
    tables = table.findall(text_of("train_args/README.md"))
    cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    told_keys = {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}
    ours, theirs = ({item.name for item in fields(of)} for of in (LongQLoRAArguments, TrainingArguments))
    assert not ours - told_keys, f"train_args/README.md lacks {sorted(ours - told_keys)}"
    assert not (more := told_keys - ours - theirs), f"train_args/README.md has {sorted(more)}, which are no keys"
