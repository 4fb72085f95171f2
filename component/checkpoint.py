"""What is in an adapter folder? One writer, one reader.

`output_dir` and each `checkpoint-N` hold PEFT's files (adapter_config.json, adapter_model.safetensors), the tokenizer,
the extended config.json and the record `longqlora.json`: base model, scaling, group size, steps, versions. The record
is written last and lists every file with its size, so an incomplete folder is recognized; but not the model card,
README.md, which its owner may edit.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from component.error import UserError
from component.storage.atomic import atomic_file, open_to_readers
from component.storage.claim import locked, make_writable
from component.storage.foreign import read_object, reading
from component.storage.generated import is_unchanged

RECORD_FILE, CARD_FILE = "longqlora.json", "README.md"
RECORDED = {"files": dict, "base_model": str, "rope_type": str, "rope_factor": int | float}  # in every record
OUTPUT_ROOT = Path(__file__).resolve().parents[1] / "output"  # of the shipped YAMLs


def write_adapter(
    folder: Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    state_dict: dict | None = None,
) -> list[str]:
    """Write PEFT's files, the tokenizer and the extended config into `folder`, each atomically.

    Args:
        config: of the extended base, without any setting of our own.
        state_dict: the gathered weights if the model holds only shards of them (ZeRO-3).

    Returns:
        The names of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".writing-*"):  # of a killed run
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
        # trained embeddings are in modules_to_save; save_embedding_layers="auto" would look up the base on the hub
        model.save_pretrained(temporary, state_dict=state_dict, save_embedding_layers=False)
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()  # else tokenizer.json keeps the last call's truncation
        tokenizer.save_pretrained(temporary)
        config.save_pretrained(temporary)
        open_to_readers(Path(temporary))
        files = [file for file in sorted(Path(temporary).iterdir()) if file.name != CARD_FILE]  # empty
        (folder / RECORD_FILE).unlink(missing_ok=True)  # incomplete until the new record is written
        for file in files:
            file.replace(folder / file.name)
    return [file.name for file in files]


def write_record(folder: Path, record: dict, names: Iterable[str] | None = None) -> None:
    """Write `longqlora.json`, with the sizes in bytes of the files that make the folder complete.

    Args:
        names: of those files; None for all files in the folder but the model card.
    """
    if names is None:
        found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
        names = [
            str(file)
            for file in found
            if not file.parts[0].startswith(".") and str(file) not in (RECORD_FILE, CARD_FILE)
        ]
    files = {name: (folder / name).stat().st_size for name in sorted(names)}
    with atomic_file(folder / RECORD_FILE) as writing:
        writing.write_text(json.dumps({**record, "files": files}, indent=2) + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> dict | None:
    """The record of an adapter folder; None if it has none (another project's adapter).

    Raises:
        UserError: the record is damaged, or a file that it lists is missing or has another size.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return None
    cure = "use another checkpoint"
    record = read_object(path, "is damaged", cure)
    with reading(f"{path} is damaged", cure):
        for key, kind in RECORDED.items():
            if not isinstance(record[key], kind):
                raise ValueError(f"{key} is {str(record[key])[:100]!r}")
    for name, size in record["files"].items():
        file = Path(folder) / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            state = "missing" if actual is None else f"{actual} bytes long instead of {size}"
            raise UserError(f"{folder} is incomplete: {name} is {state}; use another checkpoint or train again")
    return record


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders of a run by step, complete or not."""
    found = [
        (re.fullmatch(r"checkpoint-(\d+)", folder.name), folder) for folder in Path(output_dir).glob("checkpoint-*")
    ]
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in found if match)]


def latest_complete_checkpoint(output_dir: str | Path) -> Path | None:
    for folder in reversed(checkpoints(output_dir)):
        with contextlib.suppress(UserError):
            if read_record(folder) is not None:
                return folder
    return None


def remove_old_checkpoints(output_dir: str | Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Delete the oldest checkpoints until `limit` are left (None or 0: no limit), but none of `keep`.

    Used instead of transformers' rotation, which keeps the highest step even if that checkpoint is incomplete.
    """
    found, kept = checkpoints(output_dir), [folder.resolve() for folder in keep]
    excess = max(len(found) - limit, 0) if limit and limit > 0 else 0
    for folder in [folder for folder in found if folder.resolve() not in kept][:excess]:
        shutil.rmtree(folder, ignore_errors=True)


def checkpoint_to_resume(output_dir: str, resume: str | None) -> str | None:
    """The checkpoint selected by `resume_from_checkpoint`: a path, or the latest complete one for `auto` and `true`.

    Raises:
        UserError: `true` without a complete checkpoint, or a path that is not one.
    """
    if resume is None or str(resume).lower() in ("false", "none", ""):
        return None
    if str(resume).lower() in ("auto", "true"):
        latest = latest_complete_checkpoint(output_dir)
        if latest is None and str(resume).lower() == "true":
            raise UserError(
                f"resume_from_checkpoint: true, but {output_dir} has no complete checkpoint; use auto or false"
            )
        return str(_resumable(latest)) if latest else None
    if not Path(resume).is_dir():
        raise UserError(f"resume_from_checkpoint: there is no folder {resume}; use auto for the latest in output_dir")
    if read_record(resume) is None:
        raise UserError(f"resume_from_checkpoint: {resume} is incomplete: it has no {RECORD_FILE}; use auto")
    return str(_resumable(Path(resume)))


def _resumable(checkpoint: Path) -> Path:
    """`checkpoint`, if it has the optimizer's state: without it Adam and the schedule would silently start over."""
    # DeepSpeed's is in a folder global_stepN
    if any(True for pattern in ("optimizer*", "global_step*") for _ in checkpoint.glob(pattern)):
        return checkpoint
    raise UserError(
        f"resume_from_checkpoint: {checkpoint} has no optimizer state (it was saved with save_only_model: true), so a "
        "resumed run would differ; set overwrite_output_dir: true to start over, and save_only_model: false to resume"
    )


@contextlib.contextmanager
def claimed_output_dir(output_dir: str) -> Iterator[None]:
    """Hold `output_dir` for this run: its first process locks it until it ends, however it ends.

    Raises:
        UserError: another run is writing to it.
    """
    folder = Path(output_dir).resolve()  # a link to the folder of another run is that run's folder
    if int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    make_writable(folder.parent, "output_dir", folder)
    with locked(folder, "output_dir"):
        yield


def newest_run(root: Path = OUTPUT_ROOT) -> Path:
    """The most recently finished run under `root`.

    Raises:
        UserError: there is none.
    """
    records = [folder / RECORD_FILE for folder in root.glob("*") if (folder / "adapter_config.json").is_file()]
    finished = [record for record in records if record.is_file()]
    if not finished:
        raise UserError(
            f"there is no finished run under {root}; train first, or name a folder with --adapter_name_or_path"
        )
    return max(finished, key=lambda record: record.stat().st_mtime).parent


def prepare_output_dir(output_dir: str, resume: str | None, overwrite: bool) -> str | None:
    """Check that a run may write to `output_dir`, and delete the old run with `overwrite`.

    Returns:
        The checkpoint to resume from, or None.

    Raises:
        UserError: the folder already holds a run, and neither resuming nor overwriting was asked for.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {output_dir} is a file; name a folder")
    if overwrite:
        if int(os.environ.get("RANK", "0")) == 0:
            for old in checkpoints(folder):
                shutil.rmtree(old)
            for pattern in (RECORD_FILE, "adapter_*", "trainer_state.json", "*_results.json"):
                for old in folder.glob(pattern):
                    old.unlink()
            if is_unchanged(folder / CARD_FILE):
                (folder / CARD_FILE).unlink()
        return None
    start = checkpoint_to_resume(output_dir, resume)
    is_finished = (folder / "adapter_config.json").is_file()
    # `auto` starts from scratch if all checkpoints are incomplete: the run was killed before it completed one
    is_in_use = is_finished or (bool(checkpoints(folder)) and str(resume).lower() != "auto")
    if start is None and is_in_use:
        is_auto = str(resume).lower() == "auto"
        resuming = "" if is_auto else "resume_from_checkpoint: auto to resume, "
        raise UserError(
            f"output_dir: {output_dir} holds {'a finished' if is_finished else 'an unfinished'} run"
            f"{' without a complete checkpoint to resume from' if is_auto else ''}; set {resuming}"
            "overwrite_output_dir: true to replace it, or another output_dir"
        )
    return start


def check_replaceable(target: Path, field: str) -> None:
    """Refuse to replace a folder unless a merge wrote it, and all that is in it.

    Raises:
        UserError: no record of a merge, files that the record does not list, or a model card that somebody changed.
    """
    record = read_json(target / RECORD_FILE)
    if "merged_from" not in record or not isinstance(record.get("files"), dict):
        raise UserError(
            f"{field}: {target} was not written by a merge, so it is not overwritten; name another folder or remove it"
        )
    found = (str(file.relative_to(target)) for file in target.rglob("*") if not file.is_dir())
    written = {*record["files"], RECORD_FILE} - {CARD_FILE}
    written |= {CARD_FILE} if is_unchanged(target / CARD_FILE) else set()
    others = sorted(name for name in found if name not in written)
    if others:
        raise UserError(
            f"{field}: {target} holds {len(others)} files that no merge wrote, such as {others[0]}, so it is not "
            "overwritten; move them out of it, or name another folder"
        )


def read_json(file: Path) -> dict:
    """The object in a JSON file; empty if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def merged_folder(adapter: Path) -> Path:
    """The default output folder for merging `adapter`."""
    return adapter.parent / f"{adapter.name}-merged"
