"""Which trials of RULER does a result file hold? Written after each cell, so that an interrupted run can go on."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from component.error import UserError
from component.evaluate.ruler import Trial, score
from component.storage.foreign import read_object, reading
from component.storage.result import origin, write_json

# of what lies under the names
HASHES = {
    "adapter_sha256": "another adapter",
    "base_fingerprint": "other weights, config or tokenizer under the same name",
    "adapter_fingerprint": "another config or tokenizer of the adapter",
    "haystack_fingerprint": "other texts under the same name",
}
CURE = "leave out --resume, and name another --output_json"


def write_trials(path: str, record: dict[str, Any], trials: list[Trial]) -> None:
    write_json(path, {**record, "trials": [asdict(trial) for trial in trials], **origin()})


def _is_same_place(one: Any, other: Any) -> bool:
    return isinstance(one, str) and isinstance(other, str) and Path(one).resolve() == Path(other).resolve()


def kept_trials(path: str, asked: dict[str, Any], cells: list[tuple[int, str]]) -> list[Trial]:
    """The trials of the complete cells (all samples of a task at a length) in a file; none if there is no file.

    Args:
        asked: the settings that answers depend on.
        cells: (length, task) of the run; the file will hold no others.

    Raises:
        UserError: the file is none of ours, another model's, of other settings, or would lose trials.
    """
    if not Path(path).is_file():
        return []
    found = read_object(Path(path), "is no result of ruler.py", CURE)
    with reading(f"--resume: {path} is no result of ruler.py", CURE):
        before = {**{name: asked.get(name) for name in HASHES}, **found["asked"]}  # older files lack them
        trials = [Trial(**trial) for trial in found["trials"]]
        scores = [score(trial.answer, trial.references) for trial in trials]
        if scores != [trial.score for trial in trials]:
            raise ValueError("a score does not follow from its answer")
    for name, value in asked.items():
        if before.get(name) != value and not _is_same_place(before.get(name), value):
            told = HASHES.get(name) or f"{name} {before.get(name)}, not {value}"
            raise UserError(f"--resume: {path} was measured with {told}; {CURE}")
    for trial in trials:
        if (trial.length, trial.task) not in cells:
            raise UserError(
                f"--resume: {path} also holds {trial.task} at {trial.length} tokens, which would be lost; add them to "
                "--tasks and --lengths, or name another --output_json without --resume"
            )
    complete = Counter((trial.length, trial.task) for trial in trials)
    return [trial for trial in trials if complete[trial.length, trial.task] == asked["samples"]]
