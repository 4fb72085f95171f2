"""Which evaluation results belong to a folder, and what do they say?

Read are the JSON files in the folder and beside it that evaluate.py, ruler.py and passkey.py wrote, if the model that
they name is this folder and its weights are no newer. They are data of others: what does not have the expected form
is left out.
"""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from component.card.markdown import file_name, quoted, table
from component.checkpoint import RECORD_FILE, read_json
from component.error import UserError
from component.storage.foreign import read_object

ROOT = Path(__file__).resolve().parents[2]
RUN_FROM = (".", str(ROOT), str(ROOT / "script/evaluate"))  # where the programs run, which relative paths start from
MOST_FILES, LARGEST = 200, 2**24  # files; bytes of one
PROTOCOLS = {
    "longlora": "windows of a fixed length, every token but the first scored, mean loss per window averaged, the last "
    "window left out",
    "sliding": "every token of the file scored once, with as much context to its left as the window allows",
}


@dataclass(frozen=True)
class Results:
    """Sections of a card, and the files that were left out because the weights are newer."""

    sections: list[str] = field(default_factory=list)
    outdated: list[Path] = field(default_factory=list)


def results_of(folder: Path) -> Results:
    """The evaluation results of the model or adapter in `folder`."""
    found, written = Results(), _written(folder)
    for file in _candidates(folder):
        with contextlib.suppress(UserError, OSError, RuntimeError):  # the last: links that form a loop
            sections = sections_in(result := read_object(file), folder, file)
            is_older = file.stat().st_mtime < written or _is_of_others(result, folder)
            if sections and is_older:
                found.outdated.append(file)
            else:
                found.sections.extend(sections)
    return found


def _candidates(folder: Path) -> list[Path]:
    """The newest JSON files in a folder and beside it, by name; data may lie there too, so not all are read."""
    small = []
    for file in [*folder.glob("*.json"), *folder.absolute().parent.glob("*.json")]:
        with contextlib.suppress(OSError):  # removed meanwhile: other programs work beside this one
            if file.is_file() and file.stat().st_size <= LARGEST and file.name != RECORD_FILE:
                small.append((file.stat().st_mtime, file))
    return sorted(file for _, file in sorted(small)[-MOST_FILES:])


def _written(folder: Path) -> float:
    """When the weights and the config of a folder were written, in seconds."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def sections_in(result: dict[str, Any], folder: Path, file: Path) -> list[str]:
    """Markdown sections for what `result`, read from `file`, says about the model in `folder`."""
    sections = []
    for kind in (_perplexity, _ruler, _passkey, _held_out):
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
            sections += kind(result, lambda setting: _is_this(setting, folder, file), file)
    return sections


def _is_this(setting: dict[str, Any], folder: Path, file: Path) -> bool:
    """Whether the model that a result names, its adapter if it has one, is this folder, on the base that it has."""
    base, adapter = setting.get("base_model"), setting.get("peft_model")
    named = adapter or base
    if not isinstance(named, str) or not named:
        return False
    own = read_json(folder / RECORD_FILE).get("base_model")
    if adapter and base and own and Path(str(base)).resolve().name != Path(str(own)).resolve().name:
        return False  # of another base; the same one may be elsewhere
    return any((Path(start) / named).resolve() == folder.resolve() for start in (*RUN_FROM, file.parent))


def _is_of_others(result: dict[str, Any], folder: Path) -> bool:
    """Whether a result was measured with another adapter than the one in `folder`: a copy of its file is newer."""
    asked, file = result.get("asked"), folder / "adapter_model.safetensors"
    measured = asked.get("adapter_sha256") if isinstance(asked, dict) else None
    if not measured or not file.is_file():
        return False
    with file.open("rb") as stream:
        return bool(measured != hashlib.file_digest(stream, "sha256").hexdigest())


IsThis = Callable[[dict[str, Any]], bool]


def _perplexity(result: dict[str, Any], is_this: IsThis, file: Path) -> list[str]:
    """Of evaluate.py: one model, or several with --compare."""
    found = []
    for setting in result.get("models", [result]):
        if not is_this(setting):
            continue
        protocol, data = str(setting["protocol"]), setting["data_path"]
        rows = [
            [int(row["seq_len"]), int(row["stride"]), int(row["windows"]), int(row["tokens_scored"]),
             f"{float(row['perplexity']):.3f}"]
            for row in setting["results"]
        ]  # fmt: skip
        head = ["window, tokens", "stride", "windows", "tokens scored", "perplexity"]
        said = f"Protocol {quoted(protocol)}: {PROTOCOLS[protocol]}. {_how(setting, result)}"
        found.append(f"### Perplexity of {file_name(data)}\n\n{said}\n\n{table(head, rows)}")
    return found


def _ruler(result: dict[str, Any], is_this: IsThis, file: Path) -> list[str]:
    """Of ruler.py, if it has finished: only then are there scores."""
    asked = result["asked"]
    if not is_this(asked):
        return []
    lengths = [int(length) for length in result["lengths"]]
    rows = [
        [quoted(task), *(f"{100 * float(score):.1f}" for score in scores)]
        for task, scores in zip(result["tasks"], result["scores"], strict=True)
    ]
    rows.append(["mean", *(f"{100 * float(mean):.1f}" for mean in result["means"])])
    said = (
        f"Synthetic tasks after RULER (arXiv 2404.06654), {int(asked['samples'])} samples per task and length, greedy "
        f"answers, prompts as {quoted(asked['template'])}, scores in %. {_how(result, result)}"
    )
    return [f"### RULER\n\n{said}\n\n{table(['task, tokens', *map(str, lengths)], rows)}"]


def _passkey(result: dict[str, Any], is_this: IsThis, file: Path) -> list[str]:
    """Of passkey.py."""
    accuracy = result["accuracy"]
    if not is_this(result):
        return []
    rows = [
        [f"{100 * float(depth):.0f} %", *(f"{100 * float(share):.0f} %" for share in shares)]
        for depth, shares in zip(result["depths"], accuracy, strict=True)
    ]
    said = (
        f"A five-digit number hidden in filler text, {int(result['trials_each'])} trials per length and depth, greedy "
        f"answers. {_how(result, result)}"
    )
    head = ["depth, tokens", *(str(int(length)) for length in result["lengths"])]
    return [f"### Passkey retrieval\n\n{said}\n\n{table(head, rows)}"]


def _held_out(result: dict[str, Any], is_this: IsThis, file: Path) -> list[str]:
    """Of the run itself: eval_results.json in its own folder."""
    if file.name != "eval_results.json" or not is_this({"base_model": str(file.parent.resolve())}):
        return []
    said = "Held-out data of the run (`eval_file`), full attention, all tokens weighted equally: perplexity"
    return [f"### Held-out perplexity\n\n{said} {float(result['eval_perplexity']):.3f}."]


def _how(setting: dict[str, Any], result: dict[str, Any]) -> str:
    """Weights, context, attention, hardware, versions and date of a measurement.

    The context tells results of the model as it is from those with `--context_size`, by which some can be scaled.
    """
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "deepspeed")
    day = date.fromisoformat(result["date"])
    how = [
        f"Weights {quoted(setting['weights'])}",
        f"context of {int(setting['context_tokens'])} tokens",
        f"attention {quoted(setting['attention'])}",
    ]
    return ", ".join([*how, quoted(result["hardware"]), quoted(versions), f"{day}."])
