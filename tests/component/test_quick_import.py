"""What is loaded with bitsandbytes; in a process of its own, since a module is imported once."""

import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
import sys
import torch
as_ever = torch.compile
from component.quick_import import import_bitsandbytes
import_bitsandbytes()
assert torch.compile is as_ever
import bitsandbytes
print("torch._inductor.compile_fx" in sys.modules)
layer = torch.nn.Linear(8, 8)
optimizer = bitsandbytes.optim.AdamW32bit(layer.parameters(), lr=0.1)
layer(torch.ones(1, 8)).sum().backward()
before = layer.weight.detach().clone()
optimizer.step()  # uncompiled, on this CPU
assert torch.allclose(before - layer.weight, torch.full((8, 8), 0.1), atol=1e-3)
"""


def test_the_compiler_is_left_out():
    words = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "False"
