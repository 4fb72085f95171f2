"""Runs that end early: what they say, what they leave, and that they go on with the losses of one that did not.

python -m pytest tests/end_to_end/test_failure.py -m slow     # a process killed at a random moment, in every mode
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.train_run import BASIC, TRAIN_TEXTS, executable, finish, losses
from tests.web_server import free_port

S2, S3 = (f"./train_args/deepspeed/deepspeed_config_{name}.json" for name in ("s2_no_offload", "s3"))
MODES = {
    "DDP": {},
    "ZeRO-2": {"deepspeed": S2},
    "ZeRO-3": {"deepspeed": S3},
    "rows split": {"sequence_parallel_size": 2},
}


@pytest.fixture(scope="module")
def values(base_folder, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    texts = [f"{text} {number}" for number in range(5) for text in TRAIN_TEXTS]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    more = {"max_steps": 40, "save_steps": 4, "per_device_train_batch_size": 2, "resume_from_checkpoint": "auto"}
    basic = {**BASIC, "model_name_or_path": str(base_folder), "train_file": str(file), "lora_dropout": 0.1}
    return {**basic, **more, "optim": "adamw_torch"}


def poison(steps: int) -> None:
    """In the last process, the loss after `steps` steps is NaN."""
    import component.loss as module

    calls, compute = [], module.next_token_loss

    def next_token_loss(*args):
        calls.append(1)
        bad = len(calls) > steps and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        return compute(*args) * (float("nan") if bad else 1.0)

    module.next_token_loss = next_token_loss


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(train, values, tmp_path, processes):
    """In one of two processes, which tells it. What was saved before is left, and named."""
    run = train({**values, "save_steps": 1, "output_dir": str(tmp_path)}, partial(poison, 2), processes=processes)
    assert run.returncode == 1
    printed = "".join(log.read_text() for log in train.logs)
    assert ("another process of this run ended" in printed) == (processes == 2)
    assert "error: step 3: the loss is nan for a batch of 2 samples, the first of which begins with '" in printed
    assert f"The last checkpoint is {tmp_path}/checkpoint-2; resume_from_checkpoint: auto" in printed
    assert "Traceback" not in printed
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "longqlora.json").exists()


def test_gradients_that_are_not_finite_stop_the_run(train, values, tmp_path):
    """A scaling of LoRA so large that the norm overflows, though the first loss is that of the base."""
    run = train({**values, "save_steps": 1, "lora_alpha": 10**25, "output_dir": str(tmp_path)})
    assert run.returncode == 1
    assert "error: step 1: the norm of the gradients is not finite, though the losses are; lower" in run.stdout
    assert not list(tmp_path.glob("checkpoint-*"))


def started(launcher: list[str], train, values: dict, log: Path) -> subprocess.Popen:
    command = [*launcher, "train.py", "--train_args_file", str(train.yaml(values))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    first = Path(values["output_dir"]) / "checkpoint-4/longqlora.json"
    while not first.exists():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.005)
    return process


def assert_goes_on(train, values: dict, whole: Path, processes: int) -> None:
    finish(train(values, processes=processes))
    assert losses(Path(values["output_dir"])) == losses(whole)


def test_a_terminated_run_says_where_it_can_go_on(train, values, tmp_path):
    finish(train({**values, "output_dir": str(tmp_path / "whole")}))
    broken = {**values, "output_dir": str(tmp_path / "broken")}
    process = started([sys.executable], train, broken, tmp_path / "log")
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    printed = (tmp_path / "log").read_text()
    assert ": terminated (SIGTERM). The last checkpoint is " in printed
    assert "Traceback" not in printed
    assert_goes_on(train, broken, tmp_path / "whole", 1)


def is_worker(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ()
    except psutil.Error:  # it has just ended
        return False


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", MODES)
def test_a_killed_process_ends_the_run(train, values, tmp_path, mode, seed):
    """The others end within a minute, one of them with a message, and the run goes on with the same losses."""
    draw = random.Random(f"{mode} {seed}")
    values = {**values, **MODES[mode]}
    finish(train({**values, "output_dir": str(tmp_path / "whole")}, processes=2))
    broken = {**values, "output_dir": str(tmp_path / "broken")}
    launcher = [executable("torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}"]
    process = started(launcher, train, broken, tmp_path / "log")
    time.sleep(draw.random())
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if is_worker(child)]
    assert len(workers) == 2
    draw.choice(sorted(workers, key=lambda worker: worker.environ()["RANK"])).kill()
    killed = time.monotonic()
    assert process.wait(120) != 0
    psutil.wait_procs(workers, timeout=60)
    assert time.monotonic() - killed < 60
    printed = (tmp_path / "log").read_text()
    assert "error: step " in printed
    assert "The last checkpoint is " in printed
    assert_goes_on(train, broken, tmp_path / "whole", 2)
