"""How are files and folders written atomically, so that a killed program leaves a whole one or none?"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from component.error import UserError


@contextlib.contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """The path of a file beside `target` that becomes `target` only when the block has ended well."""
    target = Path(target)
    writing = target.with_name(f".{target.name}.writing")
    try:
        yield writing
        writing.replace(target)
    finally:
        writing.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` only when everything in it has been written.

    Its name is always the same, so that the next program to write `target` removes what a killed one has left; a lock,
    which ends with its process, tells that from a folder that is being written now.

    Args:
        overwrite: take the place of a `target` that exists, in one step; it is lost only then.

    Raises:
        UserError: another process is writing `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.writing"
    with _locked(folder, target):
        try:
            for left_over in folder.iterdir():
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            yield folder
            open_to_readers(folder)
            if overwrite and target.exists():
                _exchange(folder, target)
            else:
                folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """`folder`, made if need be, in the hands of this process alone."""
    folder.mkdir(mode=0o700, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # it may have become `target`, or nothing, between opening and locking
            is_ours = folder.exists() and os.fstat(handle).st_ino == folder.stat().st_ino
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            raise UserError(f"{target}: another process is writing it; wait for it, or name another folder")
        yield
    finally:
        os.close(handle)


def _exchange(folder: Path, target: Path) -> None:
    """Put `folder` in the place of `target`, and `target` in that of `folder`.

    There is no moment without a `target`, except on file systems that cannot exchange two names.
    """
    import ctypes

    at_working_folder, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(folder.absolute()), os.fsencode(target.absolute())
    if rename and rename(at_working_folder, names[0], at_working_folder, names[1], exchange) == 0:
        return
    shutil.rmtree(target)
    folder.rename(target)


def open_to_readers(folder: Path) -> None:
    """The modes that the umask gives: safetensors (0.8) keeps what it makes to its owner."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def check_target(target: Path, field: str, overwrite: bool | None = None) -> None:
    """Refuse a folder that exists already, or that cannot be made.

    Args:
        overwrite: a folder that holds a model may exist; None where the program has no such flag.
    """
    if target.exists() and not overwrite:
        or_flag = "" if overwrite is None else ", --overwrite it"
        raise UserError(f"{field}: {target} exists; name another folder{or_flag} or remove it")
    if target.exists() and not (target / "config.json").is_file():
        raise UserError(f"{field}: {target} exists and is no model, so it is not overwritten; name another folder")
    for parent in target.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{field}: {parent} is a file, so {target} cannot be made; name another folder")
