"""Run train.py in its own process; its training texts, and what it writes."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT
from tests.web_server import free_port

# lengths differ widely, so that a mean over samples is not a mean over tokens
TRAIN_TEXTS = [
    "A feather.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all, not even when the fox comes back.",
    "Groups of tokens.",
    "Positions are stretched, so that a longer text falls inside the range. " * 9,
]
GROUP = 24  # tokens: most texts span several groups, and the longest is not a multiple
LONGEST = 150  # tokens per sample
BASIC = {
    "sft": False,
    "max_seq_length": LONGEST,
    "model_max_length": 192,  # the base has 64: factor 3
    "group_size": GROUP,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.3,
    "logging_steps": 1,
    "save_steps": 1,
    "lora_rank": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "load_in_4bit": False,
    "report_to": "none",
    "use_cpu": True,
}


class Launcher:
    """Runs train.py in forked processes, which start fast, and captures the output."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")

    def yaml(self, values: dict) -> Path:
        file = self.folder / f"run-{len(list(self.folder.iterdir()))}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    def __call__(self, values: dict, sabotage=None, processes: int = 1) -> subprocess.CompletedProcess:
        """`python train.py`, or with several processes what torchrun does on one machine; the first one's output."""
        file = self.yaml(values)
        self.logs = logs = [file.with_suffix(f".{rank}.log") for rank in range(processes)]
        argv, port = ["--train_args_file", str(file)], free_port()
        running = []
        for rank, log in enumerate(logs):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            environment = {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
            running.append(self.context.Process(target=run_main, args=(argv, str(log), sabotage, environment)))
            running[-1].start()
        deadline = time.monotonic() + 100
        for process in running:
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        failed = [rank for rank, process in enumerate(running) if process.exitcode]
        shown = failed[0] if failed else 0
        return subprocess.CompletedProcess(["train.py"], running[shown].exitcode, logs[shown].read_text())


def run_main(argv: list[str], log: str, sabotage, environment: dict) -> None:
    """`python train.py *argv` in a forked process, with stdout and stderr in `log`."""
    with Path(log).open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(ROOT)
    sys.argv = ["train.py", *argv]
    torch.set_num_threads(1)
    if sabotage is not None:
        sabotage()
    import train

    train.main()


def finish(run: subprocess.CompletedProcess) -> str:
    assert run.returncode == 0, run.stdout[-4000:]
    return run.stdout


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step."""
    return logged(folder, "loss")


def logged(folder: Path, name: str) -> dict[int, float]:
    """A logged number of training by step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


def record(folder: Path) -> dict:
    return json.loads((folder / "longqlora.json").read_text())


def token_ids(folder: Path | str, texts: list[str], longest: int = LONGEST) -> list[torch.Tensor]:
    """(1, T) each: <s>, the text and </s>, truncated to `longest`; some are, some are not."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id][:longest] for text in texts]
    assert all(row[0] == tokenizer.bos_token_id for row in rows)
    assert any(len(row) == longest for row in rows)
    assert any(row[-1] == tokenizer.eos_token_id for row in rows)
    return [torch.tensor([row]) for row in rows]


def stock_model(base: Path, factor: float | None = 3.0, **changes):
    """The base in stock transformers, with positions interpolated by `factor` through its config."""
    config = AutoConfig.from_pretrained(base)
    if factor is not None:
        config.rope_parameters = {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)


def launched(launcher: list[str], values: dict, train, environment: dict | None = None) -> Path:
    """Run train.py under a launcher. Returns the output folder."""
    file = train.yaml(values)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    run = subprocess.run(
        [*launcher, "train.py", "--train_args_file", str(file)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=550,
    )  # fmt: skip
    finish(run)
    return Path(values["output_dir"])


def executable(name: str) -> str:
    return str(Path(sys.executable).parent / name)
