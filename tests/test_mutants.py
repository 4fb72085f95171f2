"""The program that plants mutants: what it changes, and that its lists fit the code."""

from collections import Counter

import pytest

from tests.mutants import EXPLAINED, ROOT, TARGETS, Mutant, describe, draw, mutants, own_tests


def lines_of(tmp_path, code: str) -> list[str]:
    """Line 3 of every mutant of a function whose third line is `code`."""
    source = f'def f(x: int = 1):\n    """One 1."""\n    {code}\n'
    (tmp_path / "module.py").write_text(source, encoding="utf-8")
    found = [mutant.apply(source.encode()).decode().splitlines() for mutant in mutants("module.py", "f", tmp_path)]
    assert all(lines[:2] == source.splitlines()[:2] for lines in found)
    return [lines[2].strip() for lines in found]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("return a + b", ["return a - b"]),
        ("return (a) * (b)", ["return (a) / (b)"]),
        ("return é // a", ["return é * a"]),
        ("return a < b", ["return a <= b"]),
        ("return a is not b", ["return a is b"]),
        ("return a or b", ["return a and b"]),
        ("return not a", ["return (a)"]),
        ("return x[0]", ["return x[1]"]),
        ("return f(2)", ["return f(1)", "return f(3)"]),
        ("return True", ["return False"]),
        ("return min(a)", ["return max(a)"]),
        ("a -= b", ["pass", "a += b"]),
        ("stream.wait_stream(other)", ["pass"]),
        ("return (a).float()", ["return (a)"]),
        ("return torch.t(a)", []),
        ("return f(a, scale=b)", ["return f(a, scale=None)"]),
        ("return f(a, strict=True)", []),
        ("raise ValueError(f'{1 + 2}')", []),
        ("assert a < b", []),
        ("print(a + b)", []),
    ],
)
def test_operators(code, expected, tmp_path):
    assert lines_of(tmp_path, code) == expected


@pytest.mark.parametrize("path", TARGETS)
def test_targets_exist(path):
    """A function that was renamed must be renamed there as well."""
    assert all(mutants(path, function) for function in TARGETS[path][0].split())
    assert all((ROOT / file).is_file() for file in own_tests(path))


def test_a_draw_repeats_and_spreads():
    drawn = draw(0, 30)
    assert drawn == draw(0, 30)
    assert draw(1, 30) != drawn
    assert {mutant.path for mutant in draw(0, 5, "loss.py")} == {"component/loss.py"}
    assert max(Counter((mutant.path, mutant.function) for mutant in drawn).values()) == 1


def test_at_most_three_mutants_are_explained():
    """By lines that exist: an explanation must not outlive its code."""
    known = {describe(mutant)[1] for path in TARGETS for mutant in all_of(path)}
    assert EXPLAINED.keys() <= known
    assert len(EXPLAINED) <= 3


def all_of(path: str) -> list[Mutant]:
    return [mutant for function in TARGETS[path][0].split() for mutant in mutants(path, function)]
