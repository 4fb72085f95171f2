"""The rows of the experiments on a real model: every key is one of train.py's."""

import subprocess
import sys

from transformers import TrainingArguments

from component.train.argument import LongQLoRAArguments
from script.experiment.real.rows import RECIPE, all_rows
from tests.conftest import ROOT


def test_keys_are_those_of_train_py():
    known = set(LongQLoRAArguments.__dataclass_fields__) | set(TrainingArguments.__dataclass_fields__)
    used = set(RECIPE).union(*(row.changes for row in all_rows().values()))
    assert used <= known


def test_rows_are_listed():
    command = [sys.executable, str(ROOT / "script/experiment/real/rows.py")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(all_rows())
    assert sum(line.endswith("RULER") for line in lines) == 8
