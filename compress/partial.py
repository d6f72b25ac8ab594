"""Atomic output: work is written to `OUT.partial-<id>` beside OUT and renamed to OUT only when it is complete.

Each such folder holds a file `lock`, which the process that writes there keeps locked; the kernel releases the lock
when the process dies. The next process that wants OUT removes the partial folders whose lock nobody holds, and only
those: a folder without a lock file is not known to be ours. The names are random because several processes may work on
one OUT. Not here: runs that can be resumed (`journal.py`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

from compress.errors import ArtifactError

LOCK = "lock"
REPLACED = "-replaced"  # the old OUT is renamed to the name of the new folder with this suffix
ATTEMPTS = 8  # to lock a folder that another process may be removing


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A locked working folder next to `out`, removed at the end together with empty parents it created for `out`.

    The caller moves what is finished out of it. Raises ArtifactError if the folder cannot be created.
    """
    above = missing_parents(out)
    with ExitStack() as end:
        end.callback(remove_empty, above)
        folder, handle = take(out)
        end.callback(os.close, handle)
        end.callback(settle, folder, out)
        yield folder


def take(out: Path) -> tuple[Path, int]:
    """A new folder next to `out` and the handle of its lock; raises ArtifactError if it cannot be created."""
    for _ in range(ATTEMPTS):
        folder = out.with_name(f"{out.name}.partial-{uuid4().hex[:8]}")
        try:
            folder.mkdir(parents=True)
            with suppress(BlockingIOError, FileNotFoundError):  # another process cleared it before the lock was held
                return folder, hold(folder / LOCK, os.O_CREAT)
        except OSError as error:
            remove(folder)
            raise ArtifactError(f"{out.parent}: cannot write there: {error.strerror}") from error
    raise ArtifactError(f"{out.parent}: the working folder of {out.name} is repeatedly removed by other processes")


def hold(lock: Path, flags: int = 0) -> int:
    """Lock the file and return its handle. Raises BlockingIOError if it is locked, FileNotFoundError if it is gone."""
    handle = os.open(lock, os.O_RDWR | flags, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not same(handle, lock):
            raise FileNotFoundError(lock)
    except OSError:
        os.close(handle)
        raise
    return handle


def same(handle: int, path: Path) -> bool:
    """Whether `path` still names this open file."""
    return path.exists() and os.path.samestat(os.fstat(handle), path.stat())


def clear(out: Path) -> None:
    """Remove the partial folders of `out` left by dead processes, after undoing a replacement left half-done.

    Folders that are locked, or that hold files but no lock, stay.
    """
    found = out.parent.glob(f"{escape(out.name)}.partial-{'[0-9a-f]' * 8}")
    for folder in [path for path in found if not path.is_symlink()]:
        with suppress(OSError):  # it is locked, not ours, or has just been removed
            if not any(folder.iterdir()):  # its process was killed before it made the lock, or after it removed it
                folder.rmdir()
                continue
            handle = hold(folder / LOCK)
            try:
                settle(folder, out)
            finally:
                os.close(handle)


def settle(folder: Path, out: Path) -> None:
    """Undo a half-done replacement of `out`, then remove the folder; if undoing fails, the folder stays."""
    with suppress(OSError):
        for before in folder.glob(f"*{REPLACED}"):
            put_back(before.with_name(before.name.removesuffix(REPLACED)), out)
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder, its lock last: if removal is cut short, the rest can still be recognized as ours."""
    with suppress(OSError):
        for path in [path for path in folder.iterdir() if path.name != LOCK]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def put_back(made: Path, out: Path) -> None:
    """Undo `exchange` if it was killed between its two renames: only then do both folders exist but `out` does not."""
    before = made.with_name(f"{made.name}{REPLACED}")
    if made.exists() and before.exists() and not out.exists():
        before.rename(out)


def exchange(made: Path, out: Path) -> None:
    """Rename the folder `made` to `out`. The folder that was there is deleted last; it is restored on failure.

    Raises ArtifactError if `made` cannot be renamed.
    """
    before = made.with_name(f"{made.name}{REPLACED}")
    replaced = out.exists()
    if replaced:
        out.rename(before)
    try:
        made.rename(out)
    except BaseException as error:
        if replaced:
            before.rename(out)
        if isinstance(error, OSError):
            raise ArtifactError(f"{out}: cannot be put in place: {error}") from error
        raise
    flush(out.parent)
    shutil.rmtree(before, ignore_errors=True)


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a temporary file beside `path`, then rename it to `path`; a failure leaves nothing behind.

    Nothing is flushed to disk: after a power cut the file may be missing or have its old content. If several processes
    write the same file, the last to finish wins, and its content is complete.
    """
    made = path.with_name(f"{path.name}.partial-{uuid4().hex[:8]}")
    try:
        write(made)
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def missing_parents(out: Path) -> list[Path]:
    """The parent folders of `out` that do not exist yet, innermost first."""
    return [parent for parent in out.parents if not parent.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are empty, in the given order."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
