"""Two machines, played by two launchers of this one: RANK and LOCAL_RANK differ. Against one process."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.end_to_end.test_sequence_parallel import assert_same_run
from tests.end_to_end.test_sequence_parallel import base_with as base_with  # fixtures
from tests.end_to_end.test_sequence_parallel import basic as basic
from tests.train_run import executable, finish
from tests.web_server import free_port

pytestmark = pytest.mark.slow
S2, S3 = (f"./train_args/deepspeed/deepspeed_config_{name}.json" for name in ("s2_no_offload", "s3"))
CASES = {  # processes per machine, changes
    "DDP": (1, {}),
    "rows split between machines": (1, {"sequence_parallel_size": 2}),
    "rows split inside of machines": (2, {"sequence_parallel_size": 2}),
    "rows split over all": (2, {"sequence_parallel_size": 4}),
    "ZeRO-2": (1, {"deepspeed": S2}),
    "ZeRO-3, 4 bits": (2, {"deepspeed": S3, "load_in_4bit": True}),
}


def torchrun(node: int, each: int, port: int, folder: Path) -> list[str]:
    words = ["--nnodes=2", f"--node_rank={node}", f"--nproc_per_node={each}", "--master_addr=127.0.0.1"]
    return [executable("torchrun"), *words, f"--master_port={port}"]


def deepspeed(node: int, each: int, port: int, folder: Path) -> list[str]:
    hosts = folder / "hostfile"
    hosts.write_text(f"one slots={each}\ntwo slots={each}\n")
    words = ["--no_ssh", f"--node_rank={node}", "--hostfile", str(hosts), "--master_addr=127.0.0.1"]
    return [executable("deepspeed"), *words, f"--master_port={port}"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("launcher", [torchrun, deepspeed], ids=lambda function: function.__name__)
def test_two_machines(train, basic, tmp_path, launcher, case):
    each, changes = CASES[case]
    values = {**basic, "per_device_train_batch_size": 1, "load_in_4bit": changes.get("load_in_4bit", False)}
    finish(train({**values, "gradient_accumulation_steps": 4, "output_dir": str(tmp_path / "whole")}))
    data_parallel = 2 * each // changes.get("sequence_parallel_size", 1)
    more = {"gradient_accumulation_steps": 4 // data_parallel, "output_dir": str(tmp_path / "split")}
    file, port = train.yaml({**values, **changes, **more}), free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = [tmp_path / f"{node}.log" for node in range(2)]
    machines = []
    for node, log in enumerate(logs):
        command = [*launcher(node, each, port, tmp_path), "train.py", "--train_args_file", str(file)]
        with log.open("wb") as stream:
            machines.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream))
    assert [machine.wait(300) for machine in machines] == [0, 0], logs[0].read_text()[-3000:]
    assert_same_run(tmp_path / "split", tmp_path / "whole")
    assert "'loss'" in logs[0].read_text()
    assert "'loss'" not in logs[1].read_text()
