"""Parsed generation flags."""

from component.inference.flags import generation_parser


def flags(*words: str):
    """With the dynamic cache, which `auto` means on a CPU, unless `words` name another."""
    return generation_parser("").parse_args(["--cache_implementation", "dynamic", *words])


GREEDY = ("--do_sample", "false")
