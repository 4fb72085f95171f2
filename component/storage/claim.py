"""May a program write where it is about to? Asked once, of all its outputs together, before any work begins.

All files that will be written are compared with all that will be read and with each other, by identity and not by
name: links and `../` are the same file. What exists needs --overwrite. Each output is locked by the operating system,
so two programs never write one output, and the lock of a killed program is gone with it.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from component.error import UserError

Paths = Mapping[str, Iterable[str | Path | None]]  # by the flag or key that named them; None is one not given


@contextlib.contextmanager
def claimed(
    written: Paths, read: Paths, *, overwrite: bool | None = None, resumed: Iterable[Path] = ()
) -> Iterator[None]:
    """Check and lock the files of `written`; the block writes them.

    Args:
        written: files, of which the folders need not exist.
        read: files and folders; of a folder, the files in it.
        overwrite: whether files that exist may be replaced; None where the program has no flag for it.
        resumed: of `written`, the program's own unfinished output, which may exist.

    Raises:
        UserError: an output is read too, is named twice, exists, can't be written, or is being written by another
            process.
    """
    outputs = [(field, Path(path)) for field, paths in written.items() for path in paths if path]
    check_outputs(outputs, _files(read), overwrite, {identity(path) for path in resumed})
    with contextlib.ExitStack() as stack:
        for field, path in outputs:
            stack.enter_context(locked(path, field))
        yield


def held_result(path: str | Path) -> contextlib.AbstractContextManager[None]:
    """Hold the file of a measurement for this program; only a measurement, this or an earlier one, is replaced.

    Raises:
        UserError: the file holds something else, can't be written, or is being written by another process.
    """
    return claimed({"--output_json": [path]}, {}, resumed=[Path(path)] if _is_measurement(Path(path)) else [])


@contextlib.contextmanager
def work_folder(folder: Path, program: str, read: Paths, field: str = "--work") -> Iterator[None]:
    """Hold a folder in which `program` may replace and delete files; a hidden file marks it as the program's own.

    Args:
        read: files and folders that must lie elsewhere.

    Raises:
        UserError: it holds files of somebody else, or an input, or another process uses it.
    """
    for reader, paths in read.items():
        for path in paths:
            if path and Path(path).resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{field}: {folder} holds {path}, which {reader} reads; name another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{field}: {folder} is a file; name a folder")
    mark = folder / f".{program}"
    if folder.is_dir() and not mark.exists() and any(folder.iterdir()):
        raise UserError(
            f"{field}: {folder} holds files that {program} did not write; move them away, or name another folder"
        )
    make_writable(folder, field, folder)
    with locked(folder, field):
        mark.touch()
        yield


def _is_measurement(file: Path) -> bool:
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"versions", "hardware", "date"} <= record.keys()


def check_outputs(
    outputs: list[tuple[str, Path]], inputs: dict[object, str], overwrite: bool | None, resumed: Iterable[object] = ()
) -> None:
    """Refuse outputs that are inputs, are named twice, exist or can't be written. See `claimed`."""
    seen: dict[object, str] = {}
    for field, path in outputs:
        found = identity(path)
        if found in inputs:
            raise UserError(f"{field}: {path} would be overwritten, but {inputs[found]} reads it; name another file")
        if found in seen:
            raise UserError(f"{field}: {path} is written by {seen[found]} too; name another file")
        seen[found] = field
        if path.is_dir():
            raise UserError(f"{field}: {path} is a folder; name a file")
        if path.exists() and not path.is_file():  # a finished file is renamed into place: it would replace /dev/null
            raise UserError(f"{field}: {path} is a device or a pipe, which can't be replaced; name a file")
        if path.exists() and not overwrite and found not in resumed:
            or_flag = "" if overwrite is None else ", or replace it with --overwrite"
            raise UserError(f"{field}: {path} exists; name another file{or_flag}")
        make_writable(path.parent, field, path)


def make_writable(folder: Path, field: str, target: Path) -> None:
    """Make `folder` if need be, and refuse one in which nothing can be written: before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{field}: {target} can't be written ({error.strerror}: {error.filename})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{field}: {target} can't be written, because its folder is read-only; name another place")


@contextlib.contextmanager
def locked(target: Path, field: str) -> Iterator[None]:
    """Hold `target`, a file or folder, for this process alone, by a lock file beside it that is removed again."""
    lock = target.absolute().parent / f".{target.name}.lock"
    try:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise UserError(f"{field}: {target} can't be written ({error.strerror}); name another place") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # its last holder may have removed it between opening and locking
            is_held = lock.exists() and os.fstat(handle).st_ino == lock.stat().st_ino
        except BlockingIOError:
            is_held = False
        if not is_held:
            raise UserError(
                f"{field}: another process is writing {target}; wait for it to end, or name another output"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def identity(path: str | Path) -> object:
    """Equal for two names of one file: device and inode of what exists, else those of its folder, and the name."""
    path = Path(path).resolve()
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    with contextlib.suppress(OSError):
        status = path.parent.stat()
        return status.st_dev, status.st_ino, path.name
    return str(path)


def _files(read: Paths) -> dict[object, str]:
    """The identity of each file that is read, and the field that names it."""
    found: dict[object, str] = {}
    for field, paths in read.items():
        for path in (Path(path) for path in paths if path):
            for file in path.iterdir() if path.is_dir() else [path]:
                found.setdefault(identity(file), field)
    return found
