"""How does training with the original's rolled S2-Attn compare? train.py with that attention in place of ours.

    python script/experiment/train_rolled.py --train_args_file FILE.yaml

For comparison only: it leaks information about future tokens (script/experiment/README.md). Takes train.py's flags.
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from component.cli import parsed_first
from component.train.argument import read_command_line

parsed_first(lambda: read_command_line(sys.argv[1:]))

from transformers import AttentionInterface

from component.attention.interface import NAME
from script.shared.rolled_attention import rolled_shift_short

if __name__ == "__main__":
    AttentionInterface.register(NAME, rolled_shift_short)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
