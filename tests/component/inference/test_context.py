"""Which part of a prompt is kept when it is longer than the context?"""

import pytest

from component.inference.context import fit_prompt, truncate_prompt
from tests.generation_flags import flags

TEN = list(range(10))


@pytest.mark.parametrize(
    ("how", "opening", "kept"),
    [
        ("left", 0, [4, 5, 6, 7, 8, 9]),
        ("left", 1, [0, 5, 6, 7, 8, 9]),
        ("left", 2, [0, 1, 6, 7, 8, 9]),
        ("middle", 1, [0, 1, 2, 7, 8, 9]),
        ("middle", 4, [0, 1, 2, 3, 8, 9]),
        ("left", 99, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_what_is_kept(how, opening, kept):
    """A context of 8 with 2 tokens reserved for the answer leaves 6."""
    assert fit_prompt(TEN, 8, 2, how, opening) == (kept, 4)


def test_nothing_is_cut_if_it_fits_or_without_truncation():
    assert fit_prompt(TEN[:6], 8, 2, "middle") == (TEN[:6], 0)
    assert fit_prompt(TEN, 8, 2, None) == (TEN, 0)


def test_at_most_a_quarter_of_the_context_is_reserved():
    assert fit_prompt(TEN, 8, 500, "left") == ([4, 5, 6, 7, 8, 9], 4)
    assert fit_prompt(TEN, 2, 500, "middle") == ([9], 9)


@pytest.mark.parametrize("how", ["middle", "left"])
def test_what_is_cut(how, tiny_llama, capsys):
    """500 new tokens are allowed, but only a quarter of the context, 16 of 64, is reserved for them."""
    prompt_ids = list(range(3, 103))
    kept = {"middle": prompt_ids[:24] + prompt_ids[-24:], "left": prompt_ids[:1] + prompt_ids[-47:]}
    assert truncate_prompt(tiny_llama, prompt_ids, flags("--truncate", how)) == kept[how]
    place = {"middle": "middle", "left": "start"}[how]
    assert capsys.readouterr().err == f"52 tokens cut from the {place} of a prompt of 100\n"
