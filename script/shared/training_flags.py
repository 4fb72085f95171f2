"""Which flags do the programs that pretrain small models share?"""

import argparse
from pathlib import Path


def add_training_flags(
    parser: argparse.ArgumentParser, seq_length: int, batch_size: int, learning_rate: float
) -> None:
    """Add the flags that `begin`, `train` and `describe` read, with one model's defaults."""
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for this long; the schedule follows the clock")
    length.add_argument("--steps", type=int, help="train this many steps")
    per_step = f"sequences of {seq_length} tokens per step ({batch_size})"
    parser.add_argument("--batch_size", type=int, default=batch_size, help=per_step)
    parser.add_argument("--learning_rate", type=float, default=learning_rate, help=f"peak value ({learning_rate:g})")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
