"""How is one row trained, then measured, on a real model? With train.py, evaluate.py and ruler.py, on one GPU."""

import argparse
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from component.model import load_config
from component.rope import extend_context
from component.storage.result import origin, write_json
from script.experiment.real.data import common_length, length_of, measured_texts, sources
from script.experiment.real.rows import BASE_CONTEXT, FULL, RECIPE, Row
from script.shared.card import run_settings
from script.shared.program import execute, read_training

REFERENCE = ("full-attention", 0)  # the row and seed that find key tokens
EVALUATIONS = 6  # during training


def steps_of(row: Row, flags: argparse.Namespace) -> int:
    return flags.max_steps or row.changes.get("max_steps", RECIPE["max_steps"])


def sequence_tokens(row: Row, flags: argparse.Namespace) -> int:
    """Tokens of a training sequence."""
    length = length_of(row, flags)
    return min(length // 2, BASE_CONTEXT) if row.changes.get("position_skipping") else length


def tokens_of(row: Row, flags: argparse.Namespace) -> int:
    """Tokens that a row is trained on."""
    accumulated: int = (RECIPE | row.changes)["gradient_accumulation_steps"]
    return steps_of(row, flags) * accumulated * sequence_tokens(row, flags)


def result_file(row: Row, seed: int, flags: argparse.Namespace) -> Path:
    return flags.work / "results" / f"{row.name}-{seed}.json"


def without_documents(result: dict) -> dict:
    """Thousands of numbers that no table shows."""
    return {key: value for key, value in result.items() if key != "by_document"}


@dataclass
class Trained:
    """A row that can be measured.

    Attributes:
        words: the flags that name its model.
        result: what is known so far.
        seconds: that it took so far.
    """

    row: Row
    seed: int
    words: list[str]
    result: dict[str, Any]
    seconds: float

    @property
    def finds_keys(self) -> bool:
        return (self.row.name, self.seed) == REFERENCE


@dataclass
class Worker:
    """Trains and measures rows, each on one GPU.

    Attributes:
        rows_per_gpu: at most; step times of rows that share a GPU say nothing.
    """

    flags: argparse.Namespace
    rows_per_gpu: int = 1
    gpu: threading.local = field(default_factory=threading.local)  # .name: for CUDA_VISIBLE_DEVICES

    def folder(self, row: Row, seed: int) -> Path:
        return self.flags.work / "runs" / f"{row.name}-{seed}"

    def prepare(self, row: Row, seed: int) -> Trained:
        """Train a row, unless it is there, trained with the same settings."""
        start, folder = time.monotonic(), self.folder(row, seed)
        length = length_of(row, self.flags)
        result: dict[str, Any] = {"row": row.name, "label": row.label, "length": length, "seed": seed}
        if row.program is None:
            words = ["--base_model", str(self.save_scaled(row, folder) if row.rope_type else self.flags.base)]
        else:
            result |= self.train(row, seed, folder) | {"rows_per_gpu": self.rows_per_gpu}
            words = ["--base_model" if row.program == FULL else "--peft_model", str(folder)]
        return Trained(row, seed, words, result, time.monotonic() - start)

    def finish(self, trained: Trained, keys_known: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Measure a row and write its result; what was trained is deleted, unless --keep names it.

        Args:
            keys_known: called once the key tokens of LongPPL are there, or will not be.
        """
        start, row, seed = time.monotonic(), trained.row, trained.seed
        try:
            trained.result["perplexity"] = self.measure(row, seed, self.folder(row, seed), trained.words)
        finally:
            if trained.finds_keys:
                keys_known()
        if row.has_ruler and seed == 0 and self.flags.samples:
            trained.result["ruler"] = self.ruler(row, self.folder(row, seed), trained.words)
        seconds = round(trained.seconds + time.monotonic() - start, 1)
        result = trained.result | {"seconds": seconds, **origin()}
        write_json(result_file(row, seed, self.flags), result)
        if row.name not in self.flags.keep or seed:
            shutil.rmtree(self.folder(row, seed), ignore_errors=True)
        return result

    def run(self, program: str, words: list[str], log: Path) -> None:
        name = getattr(self.gpu, "name", None)
        execute([program, *words], log, environment={} if name is None else {"CUDA_VISIBLE_DEVICES": name})

    def save_scaled(self, row: Row, folder: Path) -> Path:
        """Copy the base to `folder`, with scaled positions."""
        config = load_config(str(self.flags.base))
        length = length_of(row, self.flags)
        extend_context(config, length, str(row.rope_type), rope_theta=row.changes.get("rope_theta"))
        shutil.copytree(self.flags.base, folder, dirs_exist_ok=True)
        config.save_pretrained(folder)
        return folder

    def train(self, row: Row, seed: int, folder: Path) -> dict[str, Any]:
        """Train; returns the YAML's settings, the contents of train_results.json, and [step, loss] pairs."""
        length, steps, data = length_of(row, self.flags), steps_of(row, self.flags), self.flags.work / "data"
        settings = RECIPE | {
            "max_seq_length": sequence_tokens(row, self.flags),
            "model_max_length": length,
            "seed": seed,
        }
        settings |= run_settings() | row.changes | {"max_steps": steps}
        settings |= {"model_name_or_path": str(self.flags.base), "output_dir": str(folder)}
        settings |= {"train_file": str(data / f"{row.texts}.jsonl")}
        if row.program != FULL:
            settings |= {"eval_file": str(data / "eval.jsonl"), "per_device_eval_batch_size": 1}
            settings |= {"eval_strategy": "steps", "eval_steps": max(1, steps // EVALUATIONS)}
        file = folder.parent / f"{folder.name}.yaml"
        text = yaml.safe_dump(settings, sort_keys=False)
        is_trained = (folder / "train_results.json").exists() and file.exists() and file.read_text("utf-8") == text
        if not is_trained:  # else measuring failed
            file.write_text(text, encoding="utf-8")
            self.forget(row, seed, folder)
            assert row.program
            self.run(row.program, ["--train_args_file", str(file)], file.with_suffix(".log"))
        training, losses = read_training(folder)
        history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        evaluations = [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry]
        curve = [[entry["step"], entry["loss"]] for entry in losses]
        return {"settings": settings, "training": training, "losses": curve, "eval_losses": evaluations}

    def forget(self, row: Row, seed: int, folder: Path) -> None:
        """Delete what was measured with an adapter that is trained anew; with the key tokens that it found."""
        self.ruler_file(folder).unlink(missing_ok=True)
        keys = sorted((self.flags.work / "data").glob("keys-*.json")) if (row.name, seed) == REFERENCE else []
        for file in keys:
            file.unlink()
        if keys and any((self.flags.work / "results").glob("*.json")):
            text = "finds other key tokens than before; LongPPL of rows with results is over the former ones: delete "
            print(f"{row.name}-{seed} {text}{self.flags.work}/results to measure all rows alike", flush=True)

    def measure(self, row: Row, seed: int, folder: Path, words: list[str]) -> dict[str, list[dict]]:
        """{text: results of evaluate.py}, all from one process."""
        data, tasks, outputs = self.flags.work / "data", [], {}
        for text, windows in measured_texts(row, self.flags).items():
            outputs[text] = folder.with_name(f"{folder.name}-{text}.json")
            task = [*words, "--data_path", str(data / f"{text}.bin"), "--output_json", str(outputs[text])]
            task += ["--overwrite", "--seq_len", *map(str, windows)]
            task += ["--batch_size", str(max(1, self.flags.tokens_at_once // max(windows)))]
            task += self.key_token_flags(row, seed, text) if text in sources(self.flags.texts, "validation") else []
            tasks.append({"words": task, "attention": None, "group_size": None})
        file = folder.with_name(f"{folder.name}-tasks.json")
        file.write_text(json.dumps(tasks), encoding="utf-8")
        self.run("script/experiment/measure.py", [str(file)], file.with_suffix(".log"))
        read = {text: json.loads(output.read_text(encoding="utf-8")) for text, output in outputs.items()}
        return {text: [without_documents(one) for one in found["results"]] for text, found in read.items()}

    def key_token_flags(self, row: Row, seed: int, text: str) -> list[str]:
        """The flags for LongPPL; none before the key tokens are found."""
        file, length = self.flags.work / "data" / f"keys-{text}.json", common_length(self.flags)
        if (row.name, seed) != REFERENCE and not file.exists():
            return []
        context, stride = min(4096, length // 4), min(1024, length // 16)  # published, from 16384 tokens on
        rule = ["--long_ppl_context", str(context), "--long_ppl_stride", str(stride)]
        return ["--long_ppl", "true", "--key_tokens", str(file), *rule]

    @staticmethod
    def ruler_file(folder: Path) -> Path:
        return folder.with_name(f"{folder.name}-ruler.json")

    def ruler(self, row: Row, folder: Path, words: list[str]) -> dict[str, Any]:
        lengths = sorted({*(self.flags.ruler_lengths or (4096, 8192)), length_of(row, self.flags)})
        output = self.ruler_file(folder)
        more = ["--samples", str(self.flags.samples), "--batch_size", str(self.flags.ruler_batch_size)]
        more += ["--output_json", str(output), "--resume", "--template", "completion"]
        more += ["--lengths", *map(str, lengths)]
        self.run("script/evaluate/ruler.py", [*words, *more], output.with_suffix(".log"))
        return json.loads(output.read_text(encoding="utf-8"))
