"""How do the downstream experiments train, merge and measure? With this repository's programs, logging to files."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from component.cli import check_at_least
from component.error import UserError
from component.storage.claim import claimed, work_folder
from component.storage.hub import check_source
from component.storage.result import origin
from script.experiment.rows import RECIPE
from script.shared.card import run_settings
from script.shared.program import execute

MODELS = ("base", "short_base", "adapter", "extended")  # flags: folders or hub ids
INPUTS = ("base", "short_base", "adapter", "extended", "source")  # flags
# specific to the machine, left out of results
PATHS = ("model_name_or_path", "train_file", "eval_file", "output_dir", "base_model", "peft_model")


def check_flags(flags: argparse.Namespace, *, counts: tuple = (), folders: tuple = ()) -> None:
    """Reject counts below 1 and a missing --source.

    Args:
        folders: flags to make absolute, since programs run from the repository root; hub ids stay.
    """
    check_at_least(flags, 1, *counts)
    if "source" in flags and not flags.source.is_file():
        raise UserError(f"--source: there is no file {flags.source}; use a JSON Lines file")
    for name in folders:
        path = getattr(flags, name)
        if path and name in MODELS:
            check_source(str(path), f"--{name}")
        if path and (name not in MODELS or path.exists()):
            setattr(flags, name, path.resolve())


@contextlib.contextmanager
def held(flags: argparse.Namespace, program: str, *results: str) -> Iterator[None]:
    """Hold --work and the files that the flags `results` name; neither may be, or hold, an input."""
    read = {f"--{name}": [getattr(flags, name, None)] for name in INPUTS}
    written = {f"--{name}": [getattr(flags, name)] for name in results}
    with work_folder(flags.work, program, read), claimed(written, read, overwrite=flags.overwrite):
        yield


def tune(folder: Path, **settings: Any) -> dict[str, Any]:
    """Train an adapter in `folder` with train.py.

    Returns:
        {"settings", "training": train_results.json, "losses", "eval_losses"}, losses as [step, nats per token]. With
        an eval_file, the last of eval_losses is of the finished adapter.
    """
    schedule = {"lr_scheduler_type": "cosine"}  # short runs need the learning rate to decay
    settings = RECIPE | run_settings() | schedule | {"sft": True, "output_dir": str(folder)} | settings
    file = folder.with_name(f"{folder.name}.yaml")
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    execute(["train.py", "--train_args_file", str(file)], folder.with_name(f"{folder.name}.log"))
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]

    def curve(name: str) -> list[list[float]]:
        return [[entry["step"], entry[name]] for entry in history if name in entry]

    training = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))
    training.pop("step_seconds", None)
    record = json.loads((folder / "longqlora.json").read_text(encoding="utf-8"))
    training["trained_tokens"] = record["trained_tokens"]
    recorded = {key: value for key, value in settings.items() if key not in PATHS}
    evaluations = curve("eval_loss")
    if "eval_file" in settings:  # evaluated once more at the end, after the log was saved
        last = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))["eval_loss"]
        evaluations = [pair for pair in evaluations if pair[0] < record["steps"]] + [[record["steps"], last]]
    return {"settings": recorded, "training": training, "losses": curve("loss"), "eval_losses": evaluations}


def merge(adapter: Path, folder: Path) -> Path:
    """Merge an adapter into its base with merge_lora.py; returns `folder`."""
    words = ["--adapter_name_or_path", str(adapter), "--save_path", str(folder), "--overwrite"]
    execute(["script/merge_lora.py", *words], folder.with_name(f"{folder.name}.log"))
    return folder


def measured(program: str, words: list[str], output: Path) -> dict[str, Any]:
    """A program's --output_json without paths and without the origin, which the experiment records once."""
    execute([program, *words, "--output_json", str(output), "--overwrite"], output.with_suffix(".log"))
    found = json.loads(output.read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key not in (*PATHS, *origin())}
