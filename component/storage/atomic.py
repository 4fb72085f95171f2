"""How are files and folders written atomically? Beside their place, then renamed: a killed program leaves none."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from component.error import UserError


@contextlib.contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed to `target` if the block succeeds."""
    target = Path(target)
    writing = target.with_name(f".{target.name}.writing")
    try:
        with named_after(target):
            yield writing
            writing.replace(target)
    finally:
        writing.unlink(missing_ok=True)


@contextlib.contextmanager
def named_after(target: Path) -> Iterator[None]:
    """A full disk raises an OSError that names no file: name `target` in it."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            error.filename = str(target)
        raise


@contextlib.contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target`, renamed to `target` if the block succeeds.

    Its name is fixed, so the next program that writes `target` removes what a killed one left; a lock, which dies with
    its process, tells such a folder from one that is being written.

    Args:
        target: of a link, the folder that it points to is written, and the link stays.
        overwrite: replace an existing `target`, in one step at the end.

    Raises:
        UserError: `target` can't be created, or another process is writing it.
    """
    place = Path(os.path.realpath(target))
    folder = place.parent / f".{place.name}.writing"
    with _locked(folder, target):
        try:
            for left_over in folder.iterdir():
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            with named_after(target):
                yield folder
            open_to_readers(folder)
            if overwrite and place.exists():
                _exchange(folder, place)
            else:
                folder.rename(place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """Create `folder` if necessary, and lock it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target} can't be created ({error.strerror}); name another folder") from error
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # it may have been renamed or removed between opening and locking
            is_ours = folder.exists() and os.fstat(handle).st_ino == folder.stat().st_ino
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            raise UserError(f"{target}: another process is writing it; wait for it to end, or name another folder")
        yield
    finally:
        os.close(handle)


def _exchange(folder: Path, target: Path) -> None:
    """Exchange `folder` and `target`; there is always a `target`, except on file systems that can't exchange names."""
    import ctypes

    at_working_folder, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(folder.absolute()), os.fsencode(target.absolute())
    if rename and rename(at_working_folder, names[0], at_working_folder, names[1], exchange) == 0:
        return
    shutil.rmtree(target)
    folder.rename(target)


def open_to_readers(folder: Path) -> None:
    """Apply the umask: safetensors 0.8 creates files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def check_target(target: Path, field: str, overwrite: bool | None = None) -> None:
    """Refuse a folder that exists or can't be created.

    Args:
        overwrite: whether the caller may replace it; None if the program has no such flag.
    """
    if target.exists() and not overwrite:
        or_flag = "" if overwrite is None else ", --overwrite it"
        raise UserError(f"{field}: {target} exists; name another folder{or_flag} or remove it")
    for parent in target.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{field}: {parent} is a file, so {target} can't be created; name another folder")
