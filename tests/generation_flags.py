"""Parsed generation flags."""

from component.inference.flags import generation_parser


def flags(*words: str):
    return generation_parser("").parse_args(words)


GREEDY = ("--do_sample", "false")
