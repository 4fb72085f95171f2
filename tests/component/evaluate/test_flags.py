"""Which flags do the evaluation programs share? And --help of the programs is quick."""

import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

PROGRAMS = [f"evaluate/{name}.py" for name in ("evaluate", "passkey", "passkey_model", "plot_perplexity")]
PROGRAMS += ["evaluate/compare_caches.py", "merge_lora.py", "estimate_memory.py", "benchmark.py"]
PROGRAMS += [f"inference/{name}.py" for name in ("inference", "chat", "web")]
PROGRAMS += [f"data/{name}.py" for name in ("build_pretrain", "build_sft", "tokenize_bin")]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("word", "status"), [("--help", 0), ("--no_such_flag", 2)])
def test_k21_flags_are_parsed_before_slow_imports(program, word, status):
    """On two busy cores torch alone takes 3 s."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "script" / program), word]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    assert done.returncode == status, done.stderr[-2000:]
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.count("|") == 2}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "matplotlib"}
    assert seconds < 10
