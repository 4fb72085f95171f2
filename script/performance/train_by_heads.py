"""How does splitting rows by heads compare? train.py with S2-Attn by all-to-all, as in DeepSpeed Ulysses.

    deepspeed --num_gpus 2 script/performance/train_by_heads.py --train_args_file FILE.yaml

For comparison only, with sequence_parallel_size 2, 4 or 8 that divides the heads. Takes train.py's flags.
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from component.cli import parsed_first
from component.train.argument import read_command_line

parsed_first(lambda: read_command_line(sys.argv[1:]))

from script.shared.shift_short_by_heads import use_heads

if __name__ == "__main__":
    use_heads()
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
